"""How a step's metadata gets to a real GPU: beside the steps, and into its place in their order."""

import pytest
import torch

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def test_runs_arrive_whole_and_in_the_order_of_the_steps():
    from node.engine.step_block import StepBlock

    device, size = torch.device("cuda"), 5000
    block = StepBlock(8, size, device)
    busy, seen = torch.zeros(1 << 24, device=device), []
    for step in range(9):
        host = block.begin(size)
        host[:] = range(step, step + size)
        busy.add_(1)  # the step before computes while this run travels
        block.send(size - step)
        seen.append(block.view(0, size).clone())
    for step, run in enumerate(seen):
        assert run[: size - step].tolist() == list(range(step, step + size - step))


def test_run_behind_a_large_copy_does_not_change_the_step_that_computes():
    from node.engine.step_block import StepBlock

    device, size = torch.device("cuda"), 64
    block, beside = StepBlock(8, size, device), torch.cuda.Stream()
    source = torch.zeros(1 << 27, dtype=torch.uint8, pin_memory=True)
    landing, busy = torch.zeros(1 << 27, dtype=torch.uint8, device=device), torch.zeros(1 << 27, device=device)
    block.begin(size)[:] = 1
    block.send(size)
    for _ in range(40):
        busy.add_(1)
    first = block.view(0, size).clone()
    with torch.cuda.stream(beside):
        landing.copy_(source, non_blocking=True)
    block.begin(size)[:] = 2
    block.send(size)
    second = block.view(0, size).clone()
    assert first.tolist() == [1] * size
    assert second.tolist() == [2] * size
