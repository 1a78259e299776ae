"""Adapters with tensors beside their pages, in the whole engine: more of them than a GPU has pages for, beside plain ones."""

import pytest

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIDED = {
    "dora4": (4, LINEARS, {"use_dora": True}),
    "dora20": (20, ["q_proj", "down_proj"], {"use_dora": True}),
    "biased": (8, LINEARS, {"lora_bias": True}),
    "embedding": (6, ["embed_tokens", "v_proj"], {}),
}
PLAIN = {"plain3": (3, LINEARS), "plain16": (16, LINEARS)}
NAMES = [*SIDED, *PLAIN]
PROMPTS = {f"s{i}": [1, *(((11 * i + 3 * k) % 90) + 5 for k in range(4 + 5 * i % 30))] for i in range(24)}
PAGES, PLACES = 6, 4


@pytest.fixture(scope="session")
def world(build_world):
    return build_world(
        tuple((name, *rest) for name, rest in {**SIDED, **PLAIN}.items()),
        0.05,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        max_position_embeddings=256,
        initializer_range=0.1,
    )


def answers(driver):
    """Most with one adapter, some with two, some with none."""
    for index, (name, prompt) in enumerate(PROMPTS.items()):
        count = {0: 0, 5: 2}.get(index % 8, 1)
        recipe = [NAMES[(index + 3 * turn) % len(NAMES)] for turn in range(count)]
        driver.add(name, prompt, recipe, max_new_tokens=3 + 5 * index % 7)
    driver.run()
    return {name: (driver.last(name).finish_reason, driver.tokens(name)) for name in PROMPTS}


@pytest.mark.parametrize("movable_border", [False, True])
def test_tokens_are_the_cpus_while_adapters_take_turns(make_gpu, make_cpu, movable_border):
    cpu = make_cpu()
    expected = answers(cpu)
    page_bytes = 4 * 16 * sum((kind.in_features + kind.out_features) * kind.layer_count for kind in cpu.engine.ready.linears)
    memory = {"memory_bytes": PAGES * page_bytes, "host_memory_bytes": 3 * len(NAMES) * page_bytes}
    gpu = make_gpu(max_sequences=PLACES, prefix_cache=False, movable_border=movable_border, adapters=memory)
    for _ in range(2):  # from their files, then from host memory
        found = answers(gpu)
        assert found == expected
        gpu.events.clear()
    sides = gpu.engine._adapters.tensors.sides
    pages = gpu.engine._adapters.tensors.pages
    first, end = pages.data_ptr(), pages.data_ptr() + pages.nbytes
    assert all(first <= gain.data_ptr() < end for side in sides.values() for gain in side.gains.values())
