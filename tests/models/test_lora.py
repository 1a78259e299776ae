"""Adapters in one batch, each row its own, against PEFT running every row alone in float32."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from node.kernels.lora import LoraPool

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "rank1": {"r": 1, "lora_alpha": 3, "target_modules": ALL},
    "rank4": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank8": {"r": 8, "lora_alpha": 16, "target_modules": ALL},
    "rank20": {"r": 20, "lora_alpha": 5, "target_modules": ["k_proj", "up_proj", "down_proj"]},
    "rank64": {"r": 64, "lora_alpha": 16, "target_modules": ALL},
    "rslora": {"r": 8, "lora_alpha": 4, "target_modules": ALL, "use_rslora": True},
    "rank_pattern": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "rank_pattern": {"q_proj": 20, "layers.1.mlp.up_proj": 9}},
    "alpha_pattern": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "alpha_pattern": {"o_proj": 1, "layers.0.mlp.down_proj": 40}},
    "head": {"r": 8, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"]},
}


def with_adapters(reference, adapters):
    """The PEFT model with every adapter, A and B random, no two alike."""
    generator = torch.Generator().manual_seed(5)
    names = list(adapters)
    model = get_peft_model(reference, LoraConfig(**adapters[names[0]]), adapter_name=names[0]).eval()
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**adapters[name]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


def fill_pool(model, adapters, layout):
    """Put PEFT's adapters into pages, scattered, unused ranks poisoned: slot i holds the i-th adapter."""
    per_slot = layout.pages_for_rank(64)
    order = torch.randperm(per_slot * len(adapters), generator=torch.Generator().manual_seed(2)).int()
    pool = LoraPool(
        pages=torch.full((order.numel(), layout.page_elements), float("nan")),
        slot_pages=order.view(len(adapters), per_slot).contiguous(),
        ranks=torch.zeros(layout.module_count, len(adapters), dtype=torch.int32),
        scales=torch.zeros(layout.module_count, len(adapters)),
        page_rank=layout.page_rank,
    )
    modules = dict(model.named_modules())
    for span in layout.spans.values():
        module = modules.get("base_model.model." + span.name)
        for slot, name in enumerate(adapters):
            if name not in getattr(module, "lora_A", {}):
                continue
            a, b = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach().T
            pool.ranks[span.index, slot], pool.scales[span.index, slot] = a.shape[0], module.scaling[name]
            for rank in range(a.shape[0]):
                page = pool.pages[pool.slot_pages[slot, rank // layout.page_rank]]
                row = rank % layout.page_rank
                page[span.a_offset + row * span.in_features :][: span.in_features] = a[rank]
                page[span.b_offset + row * span.out_features :][: span.out_features] = b[rank]
    return pool


@pytest.fixture(params=["llama", "qwen3-biased-sliding", "llama-tied"])
def many(request, make_tiny, load):
    """A loaded base, the PEFT model of it, and a pool with all adapters; the tied model's head stays untouched in PEFT too."""
    tiny = make_tiny(request.param)
    loaded = load(tiny.directory)
    adapters = {name: config for name, config in ADAPTERS.items() if name != "head" or request.param != "llama-tied"}
    model = with_adapters(tiny.reference, adapters)
    return loaded, model, fill_pool(model, adapters, loaded.layout), list(adapters)


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


def test_forward_weighted_adapters_equal_peft_with_merged_weights(make_tiny, load, drive, prompts, error):
    tiny = make_tiny("llama")
    loaded = load(tiny.directory)
    adapters = {name: ADAPTERS[name] for name in ("rank8", "rank64", "head")}
    model = with_adapters(tiny.reference, adapters)
    driver = drive(loaded, fill_pool(model, adapters, loaded.layout))
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
