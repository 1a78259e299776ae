"""Keys and values in one array with adapter pages: tokens stay the CPU's while the border moves either way."""

import pytest

UNIT_BYTES = 17 * 2 * 3 * 16 * 128 * 4  # 17 blocks of 16 tokens: what a page of 16 ranks takes in the small Llama, float32
PROMPTS = {f"s{i}": [1, *(((7 * i + 3 * k) % 90) + 5 for k in range(5 + 9 * i))] for i in range(9)}
RECIPES = [(), ("x",), ("y",), ("z",), ("y", "x"), (), ("z",), ("y",), ("x", "z")]  # x and y have a page each, z three


def add_all(driver):
    for (name, prompt), recipe in zip(PROMPTS.items(), RECIPES, strict=True):
        driver.add(name, prompt, recipe, max_new_tokens=80)  # long enough that all run together: 71 blocks


@pytest.mark.parametrize(("kv_units", "page_units", "direction"), [(2, 8, 1), (16, 4, -1)], ids=["blocks", "pages"])
def test_border_moves_and_the_tokens_stay_the_cpus(make_gpu, make_cpu, kv_units, page_units, direction):
    cpu = make_cpu()
    add_all(cpu)
    cpu.run()
    adapters = {"memory_bytes": page_units * UNIT_BYTES}
    gpu = make_gpu(movable_border=True, kv_cache_bytes=kv_units * UNIT_BYTES, adapters=adapters, prefix_cache=False)
    assert gpu.engine.ready.kv_block_count == kv_units * 17
    add_all(gpu)
    totals = []
    for _ in range(20_000):
        events, has_computed = gpu.engine.step()
        gpu.record(events)
        totals.append(gpu.engine.stats().kv_blocks_total)
        if not gpu.engine.has_work:
            break
        if not has_computed:
            gpu.bell.wait(0.001)
            gpu.bell.clear()
    assert max(direction * total for total in totals) > direction * kv_units * 17
    assert {name: gpu.tokens(name) for name in PROMPTS} == {name: cpu.tokens(name) for name in PROMPTS}
