"""Adapters in one batch, each row its own, against PEFT running every row alone in float32."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "rank1": {"r": 1, "lora_alpha": 3, "target_modules": ALL},
    "rank4": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank8": {"r": 8, "lora_alpha": 16, "target_modules": ALL},
    "rank20": {"r": 20, "lora_alpha": 5, "target_modules": ["k_proj", "up_proj", "down_proj"]},
    "rank64": {"r": 64, "lora_alpha": 16, "target_modules": ALL},
    "rslora": {"r": 8, "lora_alpha": 4, "target_modules": ALL, "use_rslora": True},
    "rank_pattern": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "rank_pattern": {"q_proj": 20, "layers.1.mlp.up_proj": 9}},
    "alpha_pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "alpha_pattern": {"o_proj": 1, "layers.0.mlp.down_proj": 40},
    },
    "head": {"r": 8, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"]},
}


@pytest.fixture(params=["llama", "qwen3-biased-sliding", "llama-tied"])
def many(request, make_tiny, load, kernels, peft_pool):
    """A loaded base, the PEFT model of it, and a pool with all adapters; the tied model's head stays untouched in PEFT too."""
    tiny = make_tiny(request.param)
    loaded = load(tiny.directory, kernels=kernels)
    chosen = [name for name in ADAPTERS if name != "head" or request.param != "llama-tied"]
    model, pool = peft_pool(tiny.reference, {name: LoraConfig(**ADAPTERS[name]) for name in chosen}, loaded.layout)
    assert set(pool.ranks[:, chosen.index("rank_pattern")].tolist()) == {0, 4, 9, 20}
    return loaded, model, pool, chosen


def peft_logits(model, name, ids):
    with torch.no_grad():
        if name is None:
            with model.disable_adapter():
                return model(torch.tensor([ids])).logits[0]
        model.set_adapter(name)
        return model(torch.tensor([ids])).logits[0]


def test_forward_every_adapter_in_one_batch_equals_peft(many, drive, prompts, mixed_schedule, error):
    loaded, model, pool, adapters = many
    driver = drive(loaded, pool)
    pieces = [*prompts.values()]
    ids = {name: pieces[i % 3] + [i] for i, name in enumerate([*adapters, "base"])}
    for slot, name in enumerate(adapters):
        driver.add(name, ids[name], ((slot, 1.0),))
    driver.add("base", ids["base"])

    logits = driver.run(mixed_schedule({name: len(sequence) for name, sequence in ids.items()}))

    for name, sequence in ids.items():
        reference = peft_logits(model, None if name == "base" else name, sequence)
        assert error(logits[name], reference) < 1e-4, name
        if name != "base":
            plain = peft_logits(model, None, sequence)
            assert error(logits[name], plain) > 1e-2, f"{name} changes nothing: this test would prove nothing"


def test_greedy_every_adapter_in_one_batch_equals_peft_generate(many, drive, prompts):
    loaded, model, pool, adapters = many
    driver = drive(loaded, pool)
    for slot, name in enumerate(adapters):
        driver.add(name, prompts["b"], ((slot, 1.0),))

    answers = driver.greedy(10)

    prompt = torch.tensor([prompts["b"]])
    for name in adapters:
        model.set_adapter(name)
        reference = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=-1,
            pad_token_id=0,
        )
        assert answers[name] == reference[0, 7:].tolist(), name
    assert len({tuple(answer) for answer in answers.values()}) > 3


def test_forward_weighted_adapters_equal_peft_with_merged_weights(make_tiny, load, kernels, drive, prompts, peft_pool, error):
    tiny = make_tiny("llama")
    loaded = load(tiny.directory, kernels=kernels)
    adapters = {name: LoraConfig(**ADAPTERS[name]) for name in ("rank8", "rank64", "head")}
    model, pool = peft_pool(tiny.reference, adapters, loaded.layout)
    driver = drive(loaded, pool)
    driver.add("mix", prompts["a"], ((0, 0.5), (2, 1.25), (1, -0.3)))
    driver.add("base", prompts["b"])

    logits = driver.run([{"mix": 20, "base": 7}, {"mix": 9}])

    base = peft_logits(model, None, prompts["b"])
    for name, weight in (("rank8", 0.5), ("head", 1.25), ("rank64", -0.3)):
        for module in model.modules():
            if name in getattr(module, "lora_A", {}):
                module.weight.data += weight * module.get_delta_weight(name)
    assert error(logits["mix"], peft_logits(model, None, prompts["a"])) < 1e-4
    assert error(logits["base"], base) < 1e-4
