"""DoRA through the engine against PEFT's own forward pass, float32."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = [3, 17, 5, 44, 9, 23, 60, 11, 3]


@pytest.mark.parametrize("rank", [1, 8, 40, 256])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_rank_with_and_without_biases_equals_peft(base, same, family, rank):
    model = base(family)
    directory = model.adapter(f"dora{rank}", seed=rank, r=rank, lora_alpha=4, target_modules=ALL_LINEAR, use_dora=True)

    assert same(model.ours(directory), model.peft(directory)) < 1e-5
    assert same(model.plain(), model.peft(directory)) > 1e-3


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head", "down_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ALL_LINEAR, "use_rslora": True, "rank_pattern": {"v_proj": 12}},
        {"target_modules": ["k_proj"], "layers_to_transform": [0]},
    ],
    ids=["head", "embedding", "rslora-patterns", "one-layer"],
)
def test_dora_with_other_features_equals_peft(base, same, config, request):
    llama = base()
    directory = llama.adapter(f"dora-{request.node.callspec.id}", r=4, use_dora=True, **config)

    assert same(llama.ours(directory), llama.peft(directory)) < 1e-5


def test_sum_with_dora_is_the_sum_of_both_changes(base, same):
    """Weighted terms: every adapter's change of the module's output, as PEFT's delta weights give it."""
    llama = base()
    dora = llama.adapter("sum-dora", seed=5, r=4, target_modules=["q_proj", "up_proj"], use_dora=True)
    lora = llama.adapter("sum-lora", seed=6, r=3, target_modules=["q_proj", "down_proj"])
    expected = copy.deepcopy(llama.model)
    with torch.no_grad():
        for directory, weight in ((dora, 0.6), (lora, -0.4)):
            merged = PeftModel.from_pretrained(copy.deepcopy(llama.model), str(directory)).merge_and_unload()
            for (name, base_weight), (_, changed) in zip(llama.model.named_parameters(), merged.named_parameters(), strict=True):
                expected.get_parameter(name).add_(weight * (changed - base_weight))
        reference = expected(torch.tensor([IDS])).logits[0]

    ours = llama.ours(llama.term(dora, 0.6), llama.term(lora, -0.4))

    assert same(ours, reference) < 1e-5


def test_dora_is_evicted_with_its_gains(base):
    llama = base()
    directory = llama.adapter("evicted", seed=9, r=4, target_modules=["q_proj"], use_dora=True)
    first = llama.ours(directory)
    pool = llama.engine._adapters
    slot = pool.slot_of(llama.verify(directory).adapter_id)
    assert slot in pool.tensors.sides

    pool._residents.evict(llama.verify(directory).adapter_id)

    assert slot not in pool.tensors.sides
    assert torch.equal(llama.ours(directory), first)
