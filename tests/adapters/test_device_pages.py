"""Adapter pages on a real GPU: the bytes that arrive, and who waits for whom."""

import numpy as np
import pytest
import torch

from node.adapters.binding import Binding
from node.adapters.file_plan import PLACEMENT_RECORD, TENSOR_RECORD, FilePlan
from node.adapters.host_arena import HostArena
from node.adapters.loader import AdapterPlan, Filled, Inspected
from node.adapters.pool import AdapterPool
from node.adapters.residency import ResidencyState
from node.kernels.layout import PageLayout
from node.kernels.lora import SideTensors
from node.request import AdapterTerm

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

LAYOUT = PageLayout([(f"m{index}", 512, 256) for index in range(8)], 16)
MODULES = np.arange(LAYOUT.module_count)


def file_plan(rank, side_bytes=0):
    ranks = np.minimum(MODULES % 5 + 1, rank).astype(np.int32)
    return FilePlan(
        binding=Binding(()),
        is_plain=True,
        rank=rank,
        extent=LAYOUT.page_elements,
        side_bytes=side_bytes,
        tensors=np.zeros(0, TENSOR_RECORD),
        placements=np.zeros(0, PLACEMENT_RECORD),
        module_indices=MODULES,
        ranks=ranks,
        scales=(MODULES / 7).astype(np.float32),
        hash_parts=(b"",),
        hash_order=(),
    )


class Loader:
    """Fills at once; the bytes are a function of the adapter's number."""

    job_limit, job_count = 8, 0

    def __init__(self, ranks):
        self.ranks, self.ended = ranks, []

    def inspect(self, adapter_id, directory):
        self.ended.append(Inspected(AdapterPlan(adapter_id, directory, file_plan(self.ranks[int(adapter_id, 16)]))))

    def fill(self, plan, pages, *, is_urgent=False):
        for index, page in enumerate(pages):
            page[:] = expected_bits(plan.adapter_id, index)
        self.ended.append(Filled(plan, 0.0))

    def outcomes(self, wait_s=0.0):
        found, self.ended = self.ended, []
        return found

    def close(self):
        pass


def expected_bits(adapter_id, page_index):
    generator = np.random.default_rng((int(adapter_id, 16), page_index))
    return generator.integers(0, 0x7F00, LAYOUT.page_elements, dtype=np.uint16)


def term(index):
    return AdapterTerm(f"{index:064x}", f"/adapters/{index}", 1.0)


class Room:
    def __init__(self, page_count, host_page_count, ranks):
        from node.adapters.device_pages import CudaPages
        from node.adapters.pinned import allocate_pinned

        page_bytes = LAYOUT.page_elements * 2
        self.device = torch.device("cuda")
        self.compute = torch.cuda.current_stream()
        # Wider than a page, as where pages lie among keys and values.
        array = torch.zeros((page_count, LAYOUT.page_elements + 64), dtype=torch.bfloat16, device=self.device)
        self.pages = CudaPages(LAYOUT, array, max_rank=64, compute=self.compute)
        self.arena = HostArena(LAYOUT, torch.bfloat16, memory_bytes=host_page_count * page_bytes, allocate=allocate_pinned)
        self.pool = AdapterPool(LAYOUT, self.pages, Loader(ranks), self.arena)

    def load(self, *terms):
        for _ in range(10):
            self.pool.begin_step()
            if self.pool.ensure(terms).state is ResidencyState.READY:
                return
        raise AssertionError("the adapters never arrived")

    def copy_of(self, adapter_id):
        """[pages, page_elements] as the kernels of a step launched now would see them."""
        slot = self.pool.slot_of(adapter_id)
        pages = [page for page in self.pool.tensors.slot_pages[slot].tolist() if page >= 0]
        return self.pool.tensors.pages[pages, : LAYOUT.page_elements].clone()

    def assert_holds(self, adapter_id, pages):
        bits = pages.view(torch.int16).cpu().numpy().view(np.uint16)
        for index, page in enumerate(bits):
            assert np.array_equal(page, expected_bits(adapter_id, index))


def spin(milliseconds):
    """Keep the current stream busy."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))


def test_pages_and_tables_arrive_bit_for_bit():
    room = Room(8, 8, (5, 16, 17, 40))
    for index in range(4):
        room.load(term(index))
        room.pool.pin([term(index)])
        room.assert_holds(term(index).adapter_id, room.copy_of(term(index).adapter_id))
        slot, plan = room.pool.slot_of(term(index).adapter_id), file_plan((5, 16, 17, 40)[index])
        assert room.pool.tensors.ranks[:, slot].tolist() == plan.ranks.tolist()
        assert np.array_equal(room.pool.tensors.scales[:, slot].cpu().numpy(), plan.scales)
        room.pool.unpin([term(index)])


def test_launched_step_reads_what_it_named_though_the_adapter_has_left():
    room = Room(1, 4, (16, 16, 16))
    seen = []
    for round_index in range(12):
        wanted = term(round_index % 3)
        while room.pool.ensure([wanted]).state is not ResidencyState.READY:
            room.pool.begin_step()
        room.pool.pin([wanted])
        spin(2)
        seen.append((wanted.adapter_id, room.copy_of(wanted.adapter_id)))
        room.pool.unpin([wanted])
        room.pool.begin_step()
    assert room.pool.evictions_total == 11
    assert room.pool.file_loads_total == 3
    for adapter_id, pages in seen:
        room.assert_holds(adapter_id, pages)


def test_host_never_waits_for_a_busy_device():
    room = Room(2, 4, (16, 16, 16, 16))
    room.load(term(0))
    room.pool.pin([term(0)])
    spin(50)
    busy = torch.cuda.Event()
    busy.record()
    room.pool.unpin([term(0)])
    for index in (1, 2, 3):
        room.pool.begin_step()
        room.pool.ensure([term(index)])
        room.pool.begin_step()
        room.pool.ensure([term(index)])
    assert not busy.query()
    torch.cuda.synchronize()
    room.pool.begin_step()


def test_copy_beside_a_step_is_named_only_when_it_is_complete():
    room = Room(4, 4, (16, 16))
    room.load(term(0))
    room.pool.pin([term(0)])
    for _ in range(200):
        room.pool.begin_step()
        if room.pool.ensure([term(1)]).state is ResidencyState.READY:
            break
        torch.cuda.synchronize()
    assert not room.pool.is_copying
    room.assert_holds(term(1).adapter_id, room.copy_of(term(1).adapter_id))


def test_side_tensors_move_to_the_gpu_and_leave_with_their_slot():
    room = Room(3, 4, (16,))
    side = SideTensors({0: torch.arange(256.0)}, {1: torch.ones(256)}, None)
    place = room.pool._residents._tier.take("side", 2)
    sources = [torch.zeros(LAYOUT.page_elements, dtype=torch.bfloat16, pin_memory=True)]
    arrival = room.pages.send(place, sources, file_plan(16, 1000), side)
    arrival.join()
    moved = room.pages.tensors.sides[place.slot]
    assert moved.gains[0].is_cuda
    assert torch.equal(moved.gains[0].cpu(), side.gains[0])
    assert torch.equal(moved.biases[1].cpu(), side.biases[1])
    assert moved.gains[0].data_ptr() == room.pages.tensors.pages[place.pages[1]].data_ptr()
    assert room.pages.tensors.slot_pages[place.slot].tolist()[:2] == [place.pages[0], -1]
    room.pages.hide(place.slot)
    assert not room.pages.tensors.sides
