"""The order of everything that adapter memory asks a GPU for: of two that touch the same bytes one waits for the other.

`CudaPages` runs here on a machine without a GPU. Streams and events are vectors of counters (Fidge 1988, Mattern 1988): an
access that is neither before nor behind another one to the same bytes, where one of them writes, is a race, however small the
moment in which it would show.
"""

from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from torch.utils._python_dispatch import TorchDispatchMode

from node.adapters import device_pages, device_tables, halves
from node.adapters.binding import Binding
from node.adapters.file_plan import PLACEMENT_RECORD, TENSOR_RECORD, FilePlan
from node.adapters.host_arena import HostArena
from node.adapters.loader import AdapterPlan, Filled, Inspected
from node.adapters.pool import AdapterPool
from node.adapters.residency import ResidencyState
from node.kernels.layout import PageLayout
from node.kernels.lora import SideTensors
from node.request import AdapterTerm

LAYOUT = PageLayout([("model.layers.0.m", 2, 3), ("model.layers.1.m", 2, 3)], 4)
RANKS = (1, 4, 5, 8, 3, 2)
SIDED = (2, 4)  # adapters with tensors beside their pages
TERMS = tuple(AdapterTerm(f"{index:064x}", f"/adapters/{index}", 1.0) for index in range(len(RANKS)))
DEVICE_PAGES, HOST_PAGES = 4, 6
HOST = 0


class Order:
    """Who is before whom. Lane 0 is the host, every other one a stream."""

    def __init__(self):
        self.known = [{}]  # of each lane: how far it has seen each of them
        self.needs = [[]]  # of each lane's pieces of work: what must be done before
        self.done = [0]
        self.writes, self.reads = {}, {}

    def new_lane(self):
        self.known.append({})
        self.needs.append([])
        self.done.append(0)
        return len(self.known) - 1

    def see(self, lane, known):
        for other, count in known.items():
            self.known[lane][other] = max(self.known[lane].get(other, 0), count)

    def do(self, lane, reads=(), writes=()):
        """One piece of work, which comes behind all that its lane has seen; returns what is known behind it."""
        if lane != HOST:
            self.see(lane, self.known[HOST])
        known = self.known[lane]
        self.needs[lane].append({other: count for other, count in known.items() if other not in (HOST, lane)})
        known[lane] = len(self.needs[lane])
        if lane == HOST:
            self.done[HOST] = known[HOST]
        for place in reads:
            assert self.is_behind(known, self.writes.get(place)), "read beside a write"
            self.reads.setdefault(place, {})[lane] = known[lane]
        for place in writes:
            assert self.is_behind(known, self.writes.get(place)), "written beside a write"
            assert all(self.is_behind(known, read) for read in self.reads.pop(place, {}).items()), "written beside a read"
            self.writes[place] = (lane, known[lane])
        return dict(known)

    @staticmethod
    def is_behind(known, access):
        return access is None or known.get(access[0], 0) >= access[1]

    def advance(self, lane):
        """Do the next piece of a stream; False where it waits for another one or there is none."""
        at = self.done[lane]
        if at == len(self.needs[lane]) or any(self.done[other] < count for other, count in self.needs[lane][at].items()):
            return False
        self.done[lane] += 1
        return True


class Cuda:
    """What `torch.cuda` is to the modules under test."""

    def __init__(self, order):
        class Stream:
            def __init__(self, device="cpu"):
                self.device, self.lane = device, order.new_lane()

            def wait_event(self, event):
                order.see(self.lane, event.known)

            def wait_stream(self, other):
                order.see(self.lane, order.known[other.lane])

        class Event:
            def __init__(self, **kinds):
                self.known, self.lane = {}, HOST

            def record(self, stream=None):
                self.lane = (stream or cuda.current).lane
                self.known = order.do(self.lane)

            def query(self):
                if order.done[self.lane] < self.known.get(self.lane, 0):
                    return False
                order.see(HOST, self.known)
                return True

            def elapsed_time(self, other):
                return 1e-9

        cuda = self
        self.Stream, self.Event = Stream, Event
        self.current = Stream()

    def current_stream(self, device=None):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


class Torch:
    """Torch, with streams of ours and nothing page-locked."""

    def __init__(self, cuda):
        self.cuda = cuda

    def __getattr__(self, name):
        return getattr(torch, name)

    def zeros(self, *args, pin_memory=False, **options):
        return torch.zeros(*args, **options)


def places_of(tensor):
    """Addresses of its numbers."""
    first = torch.arange(tensor.untyped_storage().nbytes() // tensor.itemsize)
    offsets = first.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten()
    return (tensor.untyped_storage().data_ptr() + tensor.itemsize * offsets).tolist()


class Copies(TorchDispatchMode):
    """Notes every copy, on the stream that is current."""

    def __init__(self, order, cuda):
        super().__init__()
        self.order, self.cuda = order, cuda

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.copy_.default:
            self.order.do(self.cuda.current.lane, places_of(args[1]), places_of(args[0]))
        return operation(*args, **(kwargs or {}))


def file_plan(index):
    return FilePlan(
        binding=Binding(()),
        is_plain=index not in SIDED,
        rank=RANKS[index],
        extent=LAYOUT.page_elements,
        side_bytes=index in SIDED,
        tensors=np.zeros(0, TENSOR_RECORD),
        placements=np.zeros(0, PLACEMENT_RECORD),
        module_indices=np.array([0, 1]),
        ranks=np.full(2, RANKS[index], np.int32),
        scales=np.ones(2, np.float32),
        hash_parts=(b"",),
        hash_order=(),
    )


class Loader:
    """Does at once what it is asked for."""

    job_limit, job_count = 8, 0

    def __init__(self, order):
        self.order, self.ended = order, []

    def inspect(self, adapter_id, directory):
        self.ended.append(Inspected(AdapterPlan(adapter_id, directory, file_plan(int(adapter_id, 16)))))

    def fill(self, plan, pages, *, is_urgent=False):
        for page in pages:
            self.order.do(HOST, writes=places_of(torch.from_numpy(page)))
        self.ended.append(Filled(plan, 0.0, None if plan.file.is_plain else SideTensors({0: torch.zeros(3)}, {}, None)))

    def outcomes(self, wait_s=0.0):
        found, self.ended = self.ended, []
        return found


class Ordered(RuleBasedStateMachine):
    """Requests come, run for some steps one step ahead of the device, and end, as in `test_pool_tiers`."""

    def __init__(self):
        super().__init__()
        order = self.order = Order()
        self.cuda = Cuda(order)
        self.patches = [patch.object(module, "torch", Torch(self.cuda)) for module in (device_pages, device_tables, halves)]
        for one in self.patches:
            one.start()
        self.now_s = 0.0
        array = torch.zeros((DEVICE_PAGES, LAYOUT.page_elements))
        self.store = device_pages.CudaPages(LAYOUT, array, max_rank=12, compute=self.cuda.current)
        arena = HostArena(
            LAYOUT,
            torch.float32,
            memory_bytes=HOST_PAGES * LAYOUT.page_elements * 4,
            allocate=lambda size: torch.zeros(size, dtype=torch.uint8),
        )
        self.pool = AdapterPool(LAYOUT, self.store, Loader(order), arena, clock=lambda: self.now_s)
        self.pool.borrow_from(self.give_back)
        write = self.store._tables.write

        def noted(slot, file):
            order.do(HOST, writes=places_of(self.store._tables._columns[slot]))
            write(slot, file)

        self.store._tables.write = noted
        self.waiting, self.running, self.ending = [], [], []
        self.lent, self.idle = [], []  # pages that hold keys and values; those of them that no step names any more

    @precondition(lambda self: len(self.waiting) < 6)
    @rule(first=st.sampled_from(range(len(RANKS))), others=st.lists(st.sampled_from(range(len(RANKS))), max_size=1))
    def arrive(self, first, others):
        self.waiting.append(tuple(TERMS[index] for index in dict.fromkeys([first, *others])))

    @rule(index=st.sampled_from(range(len(RANKS))))
    def prefetch(self, index):
        self.pool.prefetch(TERMS[index])

    @rule(index=st.sampled_from(range(len(RANKS))))
    def dismiss(self, index):
        self.pool.dismiss(TERMS[index].adapter_id)

    @rule(data=st.data(), count=st.integers(1, 8))
    def advance(self, data, count):
        lanes = range(1, len(self.order.known))
        lane = data.draw(st.sampled_from(lanes))
        for _ in range(count):
            self.order.advance(lane)

    @rule()
    def finish_everything(self):
        while any(self.order.advance(lane) for lane in range(1, len(self.order.known))):
            pass

    @rule(
        is_late=st.booleans(),
        end=st.integers(0, 3),
        is_idle=st.booleans(),
        preempted=st.integers(0, 1),
        freed=st.integers(0, 2),
        lend=st.booleans(),
    )
    def step(self, is_late, end, is_idle, preempted, freed, lend):
        """Plan and launch a step.

        Args:
            is_late: Some end in the step under way, and the next one does not name them. is_idle: others are looked at behind the
                launch. freed: pages whose keys and values nobody holds any more. lend: keys and values want a page.
        """
        self.now_s += 1.0
        with Copies(self.order, self.cuda):
            for terms in self.ending:
                self.pool.unpin(terms)
            self.ending = []
            self.idle, self.lent = self.idle + self.lent[:freed], self.lent[freed:]
            self.pool.begin_step()
            for terms in self.running[:preempted]:
                self.pool.unpin(terms)
            self.waiting, self.running = self.running[:preempted] + self.waiting, self.running[preempted:]
            for terms in list(self.waiting):
                if self.pool.ensure(terms).state is ResidencyState.READY and len(self.running) < 3:
                    self.waiting.remove(terms)
                    self.pool.pin(terms)
                    self.running.append(terms)
            if lend:
                self.lend()
            self.look_ahead(not is_idle)
            self.launch()
            self.look_ahead(is_idle)
            if is_late:
                for terms in self.running[:end]:
                    self.pool.unpin(terms)
            else:
                self.ending = self.running[:end]
            self.running = self.running[end:]

    def look_ahead(self, is_now):
        if is_now:
            for terms in self.waiting:
                self.pool.ensure(terms)
            self.pool.grant_wishes()

    def lend(self):
        page = self.pool.take_page()
        if page is not None:
            self.lent.append(page)

    def give_back(self, count):
        for _ in range(min(count, len(self.idle))):
            self.pool.add_page(self.idle.pop())

    def launch(self):
        """Two halves: each reads its part of the pages of whoever runs, and all of the tables; keys and values are anywhere."""
        compute, tensors = self.cuda.current, self.pool.tensors
        slots = {self.pool.slot_of(term.adapter_id) for terms in self.running for term in terms}
        tables = [place for slot in slots for table in (tensors.ranks, tensors.scales) for place in places_of(table[:, slot])]
        pages = [tensors.pages[page] for slot in slots for page in tensors.slot_pages[slot].tolist() if page >= 0]
        sides = [place for slot in slots if slot in tensors.sides for place in places_of(tensors.sides[slot].gains[0])]
        tables += sides
        lent = [place for page in self.lent for place in places_of(tensors.pages[page])]
        half = LAYOUT.half()
        self.order.do(compute.lane, [*tables, *(place for page in pages for place in places_of(page[:half]))], lent)
        if slots:
            tensors.halfway()
        self.order.do(compute.lane, [*tables, *(place for page in pages for place in places_of(page[half:]))], lent)

    def teardown(self):
        for one in self.patches:
            one.stop()


TestOrdered = Ordered.TestCase
TestOrdered.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("successor", [0, 2])
def test_slot_of_an_adapter_that_nobody_named_is_shown_before_its_successor_comes(successor):
    machine = Ordered()
    plain = {"is_late": False, "end": 0, "is_idle": False, "preempted": 0, "freed": 0, "lend": False}
    try:
        machine.prefetch(1)
        machine.step(**plain)
        machine.step(**plain)
        machine.arrive(successor, [])
        machine.step(**plain)
        machine.finish_everything()
        machine.dismiss(1)
        for _ in range(3):
            machine.step(**plain)
        assert TERMS[successor].adapter_id in machine.pool.resident_ids
        assert TERMS[1].adapter_id not in machine.pool.resident_ids
    finally:
        machine.teardown()
