"""Adapters of a base whose checkpoint has fused matrices (Phi-3), as PEFT trains them, float32."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from attribution.record import Merge
from node.adapters.merges.build import build
from node.adapters.merges.recipe import MergeRecipe, MergeSource
from node.errors import AdapterInvalidError

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "target_modules": FUSED},
        {"r": 256, "target_modules": ["qkv_proj"]},
        {"r": 3, "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"gate_up_proj": 11}},
        {"r": 4, "target_modules": FUSED, "use_dora": True},
        {"r": 4, "target_modules": ["qkv_proj", "embed_tokens", "lm_head"], "layers_to_transform": None},
        {"r": 2, "target_modules": ["gate_up_proj"], "lora_bias": True},
        {"r": 1, "target_modules": FUSED},
        {"r": 256, "target_modules": FUSED, "use_dora": True},
    ],
    ids=["all", "rank256", "patterns", "dora", "embedding-head", "bias", "rank1", "dora-rank256"],
)
def test_fused_base_equals_peft(base, same, config, request):
    phi = base("phi3")
    directory = phi.adapter(f"fused-{request.node.callspec.id}", **config)

    assert same(phi.ours(directory), phi.peft(directory)) < 1e-5
    assert same(phi.plain(), phi.peft(directory)) > 1e-3


def test_fused_base_without_adapter_equals_transformers(base, same):
    phi = base("phi3")

    assert same(phi.ours(), phi.plain()) < 1e-5


def recipe_of(base, merge, directories):
    sources = [MergeSource(base.verify(directory).adapter_id, directory, weight) for directory, weight in directories]
    return MergeRecipe(merge, tuple(sources))


def test_ties_of_fused_adapters_prunes_whole_matrices_as_peft_does(base, same, tmp_path):
    phi = base("phi3")
    directories = [
        (phi.adapter(f"fused-ties{seed}", seed=seed, r=4, target_modules=FUSED), weight)
        for seed, weight in ((1, "0.7"), (2, "0.4"))
    ]
    model = PeftModel.from_pretrained(copy.deepcopy(phi.model), str(directories[0][0]), adapter_name="0").eval()
    model.load_adapter(str(directories[1][0]), adapter_name="1")
    model.add_weighted_adapter(["0", "1"], [0.7, 0.4], "merged", combination_type="ties", density=0.4)
    model.set_adapter("merged")
    (tmp_path / "derived").mkdir()

    build(
        recipe_of(phi, Merge("ties", "0.4", "total"), directories),
        tmp_path / "derived",
        phi.table,
        max_rank=64,
        max_bytes=1 << 30,
    )

    with torch.no_grad():
        reference = model(torch.tensor([[3, 17, 5]])).logits[0]
    assert same(phi.ours(tmp_path / "derived", ids=[3, 17, 5]), reference) < 1e-5
    ours = load_file(tmp_path / "derived" / "adapter_model.safetensors")
    assert any("qkv_proj" in name for name in ours)


def test_merging_fused_modules_with_their_parts_is_refused_by_name(base, tmp_path):
    """The exact sum serves both at once; a merge of factors has no common tensor."""
    phi, llama = base("phi3"), base("llama")
    fused = phi.adapter("fused-mixed", r=4, target_modules=["qkv_proj"])
    parts = llama.adapter("parts-mixed", r=4, target_modules=["q_proj"])
    recipe = recipe_of(phi, Merge("linear_factors"), [(fused, "1"), (parts, "1")])
    (tmp_path / "derived").mkdir()

    with pytest.raises(AdapterInvalidError, match="fused modules"):
        build(recipe, tmp_path / "derived", phi.table, max_rank=64, max_bytes=1 << 30)

    assert phi.ours(fused, parts).shape[1] == 61
