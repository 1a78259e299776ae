"""Adapter pages on a GPU, filled by a copy stream beside the steps.

A page in pieces and one small copy for the tables, then an event. Nothing here ever waits: a copy into pages that
a launched step may still read waits on the device for the event recorded after that step, and a step that names an adapter on its
way waits on the device for the copy's event.

The copy engine takes turns between streams from one copy to the next, so what a step sends for itself would wait for a whole page
(1.6 ms for 84 MB): hence the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from node.adapters.device_side import SideRoom
from node.adapters.device_tables import DeviceTables
from node.adapters.file_plan import FilePlan
from node.adapters.halves import EarlyArrival, Halves
from node.adapters.page_store import SLOT_LIMIT
from node.adapters.tier import Place
from node.kernels.layout import PageLayout
from node.kernels.lora import LoraPool, SideTensors

PIECE_BYTES = 8 << 20  # 0.15 ms at 55 GB/s


class Fences:
    """Events in the order of launched steps: mark m is reached when everything launched before the m-th `advance` has run.

    Args:
        compute: The stream that steps are launched on.
    """

    def __init__(self, compute: torch.cuda.Stream) -> None:
        self._compute = compute
        self._events: dict[int, torch.cuda.Event] = {}
        self._free: list[torch.cuda.Event] = []
        self._last = 0

    @property
    def mark(self) -> int:
        """The mark of the next `advance`."""
        return self._last + 1

    @property
    def newest(self) -> int:
        """The mark of the last `advance`."""
        return self._last

    def advance(self) -> None:
        """Everything launched until now comes before this mark."""
        self._retire()
        event = self._free.pop() if self._free else _new_event()
        event.record(self._compute)
        self._last += 1
        self._events[self._last] = event

    def guard(self, stream: torch.cuda.Stream, mark: int) -> None:
        """Let `stream` wait until a mark is reached.

        No place that is claimed has one beyond the newest: nothing is let go between a step's launch and the next `begin_step`,
        and before that launch the newest mark covers every step.
        """
        event = self._events.get(min(mark, self._last))
        if event is not None:
            stream.wait_event(event)

    def has_reached(self, mark: int) -> bool:
        """Whether a mark is reached; never waits."""
        self._retire()
        return mark <= self._last and mark not in self._events

    def _retire(self) -> None:
        """Forget the marks that are reached: whoever asks for them has nothing to wait for."""
        for mark in list(self._events):
            if not _is_reached(self._events[mark]):
                break
            self._free.append(self._events.pop(mark))


class CudaArrival:
    """One adapter's copies. See `EarlyArrival`."""

    early_share: float | None = None

    def __init__(
        self, begin: torch.cuda.Event, event: torch.cuda.Event, compute: torch.cuda.Stream, show: Callable[[], None]
    ) -> None:
        self._begin = begin
        self._event = event
        self._compute = compute
        self._show = show
        self._is_joined = False

    def is_done(self) -> bool:
        return _is_reached(self._event)

    def join(self) -> None:
        if not self._is_joined:
            self._compute.wait_event(self._event)
            self._show()
            self._is_joined = True

    def seconds(self) -> float:
        return float(self._begin.elapsed_time(self._event)) / 1e3


class CudaPages:
    """The pages that steps on a GPU compute from.

    Args:
        layout: The order of modules inside a page.
        pages: [P, at least page_elements] on a GPU. Finite everywhere: a tile may load ranks beyond an adapter's, and what it
            masks out must not be NaN.
        max_rank: The largest rank served; sizes the page list of a slot.
        compute: The stream that steps are launched on.
        first_page: Pages before this one hold something else at first.
    """

    def __init__(
        self, layout: PageLayout, pages: Tensor, *, max_rank: int, compute: torch.cuda.Stream, first_page: int = 0
    ) -> None:
        device, page_count = pages.device, pages.shape[0]
        slot_count = min(page_count, SLOT_LIMIT)
        self.first_page = first_page
        self._tables = DeviceTables(layout.module_count, slot_count, compute, device)
        self.tensors = LoraPool(
            pages=pages,
            slot_pages=torch.full((slot_count, layout.pages_for_rank(max_rank)), -1, dtype=torch.int32),
            ranks=self._tables.ranks,
            scales=self._tables.scales,
            page_rank=layout.page_rank,
        )
        self._slot_pages = self.tensors.slot_pages.numpy()
        self._device = device
        self._compute = compute
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._fences = Fences(compute)
        self._seconds = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._half = layout.half()
        self._foreign = 0  # the last mark of pages that held no layers of an adapter
        self._halves = Halves(compute)
        if self._half is not None:
            self.tensors.halfway = self._halves.reach
        self._copies.wait_stream(compute)  # what filled `pages`

    def begin_step(self) -> None:
        """Everything launched until now belongs to the marks before this one."""
        self._fences.advance()

    def mark(self) -> int:
        """The point after everything that is launched before the next `begin_step`."""
        return self._fences.mark

    def foreign_mark(self) -> int:
        """The same, for pages that held no adapter: no order of layers says which part of them is still read."""
        self._foreign = self._fences.mark
        return self._foreign

    def hide(self, slot: int) -> None:
        """No step that is launched from now on names this slot. Launched ones may: its pages and columns stay as they are."""
        self._slot_pages[slot] = -1
        if self.tensors.sides.pop(slot, None) is not None:
            self.foreign_mark()

    def send(
        self, place: Place, sources: Sequence[Tensor], file: FilePlan, side: SideTensors | None
    ) -> CudaArrival | EarlyArrival:
        """Start to copy an adapter into its place, tables included. See `DevicePages`."""
        self._tables.write(place.slot, file)
        self._tables.guard(self._copies, place.slot)
        half = self._half
        if side is None and half is not None and half < file.extent and self._fences.has_reached(self._foreign):
            return self._send_halves(place, sources, file, half)
        begin, event = _new_timer(), _new_timer()
        with torch.cuda.stream(self._copies):
            self._fences.guard(self._copies, place.fence)
            begin.record(self._copies)
            for page, source in zip(place.pages, sources, strict=False):  # behind them may be pages for its side tensors
                _copy_in_pieces(self.tensors.pages[page, : file.extent], source[: file.extent])
            self._tables.send(place.slot)
            if side is not None:
                room = SideRoom([self.tensors.pages[page] for page in place.pages[len(sources) :]], self._compute)
                self.tensors.sides[place.slot] = room.send(side, self._device)
            event.record(self._copies)
        self._slot_pages[place.slot, : len(sources)] = place.pages[: len(sources)]
        return CudaArrival(begin, event, self._compute, lambda: self._tables.show(place.slot))

    def _send_halves(self, place: Place, sources: Sequence[Tensor], file: FilePlan, half: int) -> EarlyArrival:
        """The same, so that the next step may name it although the newest one still reads its pages."""
        begin, first, event = _new_timer(), _new_timer(), _new_event()
        pairs = [(self.tensors.pages[page], source) for page, source in zip(place.pages, sources, strict=False)]
        with torch.cuda.stream(self._copies):
            if place.fence == self._fences.newest:
                self._halves.guard(self._copies)
            else:
                self._fences.guard(self._copies, place.fence)
            begin.record(self._copies)
            for page, source in pairs:
                _copy_in_pieces(page[:half], source[:half])
            self._tables.send(place.slot)
            first.record(self._copies)
        with torch.cuda.stream(self._seconds):
            self._seconds.wait_event(first)
            self._fences.guard(self._seconds, place.fence)
            for page, source in pairs:
                _copy_in_pieces(page[half : file.extent], source[half : file.extent])
            event.record(self._seconds)
        self._slot_pages[place.slot, : len(sources)] = place.pages[: len(sources)]
        share = half / file.extent
        return EarlyArrival(begin, first, event, share, self._compute, self._halves, lambda: self._tables.show(place.slot))


def _copy_in_pieces(place: Tensor, source: Tensor) -> None:
    """[n] each, on the current stream."""
    step = PIECE_BYTES // source.element_size()
    for start in range(0, source.numel(), step):
        place[start : start + step].copy_(source[start : start + step], non_blocking=True)


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _new_timer() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _is_reached(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]
