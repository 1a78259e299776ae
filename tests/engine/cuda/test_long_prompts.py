"""A prompt of 32k tokens on a GPU: computed in chunks, with the CPU's tokens, in no more memory than a short one takes."""

import pytest
import torch

LENGTH, CHUNK, NEW = 32_768, 2_048, 8
PROMPT = [1, *(((7 * k + k // 11) % 90) + 5 for k in range(LENGTH - NEW - 1))]
SETTINGS = {
    "max_model_len": LENGTH,
    "max_batch_tokens": CHUNK,
    "max_sequences": 4,
    "kv_block_size": 64,
    "kv_cache_bytes": LENGTH * 2 * 2 * 2 * 64 * 4 + (1 << 20),  # one such sequence, and not two
    "prefix_cache": False,
    "threads": 0,
    "adapters": {"memory_bytes": 16 << 20, "host_memory_bytes": 16 << 20},
}


@pytest.fixture(scope="session")
def world(build_world):
    """Two layers of four heads of 64 over two of keys and values, which reach as far as the prompt; one adapter."""
    return build_world(
        (("y", 16, ["q_proj", "v_proj", "o_proj", "down_proj"]),),
        0.05,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
    )


def run(driver, name, prompt):
    driver.add(name, prompt, ["y"], max_new_tokens=NEW)
    driver.run()
    assert driver.last(name).finish_reason == "length", driver.last(name)
    return driver.tokens(name)


def test_prompt_of_32k_tokens_gives_the_cpus_tokens_in_the_memory_of_a_short_one(make_driver):
    driver = make_driver(device="cuda", **SETTINGS)
    run(driver, "first", PROMPT[:100])  # compiles and allocates what stays
    peaks = {}
    for name, prompt in (("short", PROMPT[: 2 * CHUNK]), ("long", PROMPT)):
        steps = driver.engine.stats().steps_total
        torch.cuda.reset_peak_memory_stats()
        found = run(driver, name, prompt)
        peaks[name] = torch.cuda.max_memory_allocated()
        assert driver.engine.stats().steps_total - steps >= len(prompt) // CHUNK
    assert peaks["long"] <= peaks["short"] + (1 << 20)
    assert found == run(make_driver(**SETTINGS), "long", PROMPT)
