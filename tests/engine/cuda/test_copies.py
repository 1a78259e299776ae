"""What a decode step takes from the host: one copy, whatever its adapters, while no request asks for more than next tokens."""

import pytest
import torch

STEPS = 5
PROMPT_ROWS = 12


@pytest.mark.parametrize("recipes", [[()], [("x",), ("y",), ("y", "x"), ()]], ids=["base", "lora"])
def test_decode_step_reads_the_host_in_one_copy(make_gpu, recipes):
    driver = make_gpu(dtype="bfloat16", prefix_cache=False)
    for index, recipe in enumerate(recipes):
        driver.add(f"s{index}", [1, *range(5, 4 + PROMPT_ROWS)], recipe, max_new_tokens=60)
    while min(len(driver.events.get(f"s{index}", ())) for index in range(len(recipes))) < 8:  # all decode, adapters are here
        driver.record(driver.engine.step()[0])
        driver.bell.wait(0.001)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(STEPS):
            driver.record(driver.engine.step()[0])
        torch.cuda.synchronize()
    copies = [event for event in seen.events() if event.name.startswith("Memcpy HtoD")]
    assert len(copies) == STEPS
    driver.run()
    assert all(len(driver.tokens(f"s{index}")) == 60 for index in range(len(recipes)))
