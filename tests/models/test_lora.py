"""Adapters in one batch, each row its own, against PEFT running every row alone in float32."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["llama", "llama-tied", "mistral-sliding", "qwen2", "qwen3-biased-sliding"])
def many(request, make_tiny, load, kernels, peft_pool, lora_configs):
    """A loaded base, the PEFT model of it, and a pool with all adapters; the tied model's head stays untouched in PEFT too."""
    tiny = make_tiny(request.param)
    loaded = load(tiny.directory, kernels=kernels)
    configs = lora_configs()
    if request.param == "llama-tied":
        del configs["head"]
    chosen = list(configs)
    model, pool = peft_pool(tiny.reference, configs, loaded.layout)
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


def test_wanted_rows_have_the_bits_that_they_have_among_all(many, drive, prompts):
    loaded, _, pool, adapters = many
    whole, some = drive(loaded, pool), drive(loaded, pool)
    for driver in (whole, some):
        for slot, name in enumerate(adapters):
            driver.add(name, prompts["abc"[slot % 3]], ((slot, 1.0),))
        driver.add("base", prompts["b"])
    lengths = {name: len(ids) for name, ids in whole.ids.items()}
    ends = torch.tensor(list(lengths.values())).cumsum(0)
    wanted = torch.cat([ends[::2] - 1, ends[1:2] - 2])
    inputs = some.inputs(lengths)
    inputs.logit_rows = wanted

    found, expected = some.forward(inputs), torch.cat(list(whole.step(lengths).values()))[wanted]

    if loaded.model._kernels.name == "reference":  # whose bits follow the number of rows
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)


def test_forward_weighted_adapters_equal_peft_with_merged_weights(
    make_tiny, load, kernels, drive, prompts, peft_pool, lora_configs, error
):
    tiny = make_tiny("llama")
    loaded = load(tiny.directory, kernels=kernels)
    model, pool = peft_pool(tiny.reference, lora_configs("rank8", "rank64", "head"), loaded.layout)
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
