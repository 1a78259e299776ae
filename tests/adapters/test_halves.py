"""Adapters that follow each other through the layers of steps on a real GPU: what every half of every step reads."""

import numpy as np
import pytest
import torch

from node.adapters.binding import Binding
from node.adapters.file_plan import PLACEMENT_RECORD, TENSOR_RECORD, FilePlan
from node.adapters.loader import AdapterPlan, Filled, Inspected
from node.adapters.residency import ResidencyState
from node.kernels.layout import PageLayout
from node.request import AdapterTerm

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

LAYOUT = PageLayout([(f"model.layers.{layer}.m{index}", 4096, 2048) for layer in range(4) for index in range(2)], 16)


MODULES = np.arange(LAYOUT.module_count)


def term(index):
    return AdapterTerm(f"{index:064x}", f"/adapters/{index}", 1.0)


def expected_bits(adapter_id):
    return np.random.default_rng(int(adapter_id, 16)).integers(0, 0x7F00, LAYOUT.page_elements, dtype=np.uint16)


def file_plan(adapter_id):
    """Ranks tell adapters apart; pages are copied whole."""
    return FilePlan(
        binding=Binding(()),
        is_plain=True,
        rank=16,
        extent=LAYOUT.page_elements,
        side_bytes=0,
        tensors=np.zeros(0, TENSOR_RECORD),
        placements=np.zeros(0, PLACEMENT_RECORD),
        module_indices=MODULES,
        ranks=((MODULES + int(adapter_id, 16)) % 16 + 1).astype(np.int32),
        scales=(MODULES / 7).astype(np.float32),
        hash_parts=(b"",),
        hash_order=(),
    )


class Loader:
    """Fills at once."""

    job_limit, job_count = 8, 0

    def __init__(self):
        self.ended = []

    def inspect(self, adapter_id, directory):
        self.ended.append(Inspected(AdapterPlan(adapter_id, directory, file_plan(adapter_id))))

    def fill(self, plan, pages, *, is_urgent=False):
        pages[0][:] = expected_bits(plan.adapter_id)
        self.ended.append(Filled(plan, 0.0))

    def outcomes(self, wait_s=0.0):
        found, self.ended = self.ended, []
        return found


class Steps:
    """A graph that reads the whole of the only page, its second half much later, and the slot's ranks when it begins."""

    def __init__(self, tensors, half):
        self.tensors, self.half = tensors, half
        self.busy = torch.zeros(1 << 26, device="cuda")
        self.page = torch.zeros(LAYOUT.page_elements, dtype=torch.bfloat16, device="cuda")
        self.ranks = torch.zeros(LAYOUT.module_count, dtype=torch.int32, device="cuda")
        self.run()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.run()

    def work(self):
        for _ in range(8):
            self.busy.add_(1)

    def run(self):
        self.ranks.copy_(self.tensors.ranks[:, 0])
        self.work()
        self.page[: self.half].copy_(self.tensors.pages[0, : self.half])
        if self.tensors.halfway is not None:
            self.tensors.halfway()
        self.work()
        self.page[self.half :].copy_(self.tensors.pages[0, self.half : LAYOUT.page_elements])

    def launch(self):
        self.graph.replay()
        return self.page.clone(), self.ranks.clone()


@pytest.mark.parametrize("is_early", [True, False])
def test_steps_read_their_own_adapter_while_the_next_one_follows(monkeypatch, is_early):
    from node.adapters.device_pages import CudaPages
    from node.adapters.host_arena import HostArena
    from node.adapters.pinned import allocate_pinned
    from node.adapters.pool import AdapterPool

    half = LAYOUT.half()
    page_bytes = LAYOUT.page_elements * 2
    array = torch.zeros((1, LAYOUT.page_elements), dtype=torch.bfloat16, device="cuda")
    store = CudaPages(LAYOUT, array, max_rank=16, compute=torch.cuda.current_stream())
    arena = HostArena(LAYOUT, torch.bfloat16, memory_bytes=8 * page_bytes, allocate=allocate_pinned)
    pool = AdapterPool(LAYOUT, store, Loader(), arena)
    steps = Steps(store.tensors, half)
    if is_early:
        monkeypatch.setattr(pool._route._copies, "is_hidden", lambda adapter_id: True)
        monkeypatch.setattr(pool._demand, "running_count", 1)
    seen = []
    for turn in range(40):
        wanted = term(turn % 6)
        for _ in range(10_000):
            pool.begin_step()
            if pool.ensure([wanted]).state is ResidencyState.READY:
                break
        pool.pin([wanted])
        seen.append((wanted, *steps.launch()))
        store._seconds.synchronize()  # this adapter has come whole, and its step still reads it
        pool.unpin([wanted])
    for wanted, page, ranks in seen:
        expected = torch.from_numpy(expected_bits(wanted.adapter_id).view("int16")).cuda()
        assert torch.equal(page.view(torch.int16), expected)
        assert ranks.tolist() == file_plan(wanted.adapter_id).ranks.tolist()
