"""Hidden states of the last token, against transformers and PEFT, among sequences that generate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

PROMPTS = {f"s{i}": [1, *(((7 * i + 3 * k) % 90) + 5 for k in range(5 + 4 * i))] for i in range(4)}
ADAPTERS = {"s0": (), "s1": ("x",), "s2": ("y",), "s3": ()}


def expected(world, name):
    model = LlamaForCausalLM.from_pretrained(world.model_dir).eval()
    if ADAPTERS[name]:
        model = PeftModel.from_pretrained(model, world.adapters[ADAPTERS[name][0]]).eval()
    with torch.no_grad():
        return model(torch.tensor([PROMPTS[name]]), output_hidden_states=True).hidden_states[-1][0, -1].numpy()


@pytest.mark.parametrize("max_batch_tokens", [16, 512])
def test_embedding_equals_the_last_hidden_state_of_the_adapted_model(make_driver, world, max_batch_tokens):
    driver = make_driver(max_batch_tokens=max_batch_tokens)
    for name, prompt in PROMPTS.items():
        driver.add(name, prompt, ADAPTERS[name], embeds=True, max_new_tokens=0)
        driver.add(f"{name}-text", prompt, ADAPTERS[name], max_new_tokens=5)
    driver.run()

    for name in PROMPTS:
        last = driver.last(name)
        found = np.frombuffer(last.embedding, dtype=np.float32)
        assert (last.finish_reason, last.tokens) == ("length", ())
        np.testing.assert_allclose(found, expected(world, name), rtol=2e-4, atol=2e-4)
        assert driver.last(f"{name}-text").embedding is None
        assert len(driver.tokens(f"{name}-text")) == 5


def test_embedding_of_a_warm_prefix_has_the_same_bits(make_driver):
    driver = make_driver(prefix_cache=True)
    for name in ("cold", "warm"):
        driver.add(name, PROMPTS["s3"], (), embeds=True, max_new_tokens=0)
        driver.run()

    assert driver.last("warm").cached_prompt_tokens > 0
    assert driver.last("warm").embedding == driver.last("cold").embedding


def test_embedding_of_one_token_is_there(driver):
    driver.add("one", [5], (), embeds=True, max_new_tokens=0)
    driver.run()

    assert len(driver.last("one").embedding) == 64 * 4
