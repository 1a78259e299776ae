"""Steps recorded as CUDA graphs: decode by batch size, and small steps with prompt chunks by their number of rows,
both with and without adapters. Launched one by one, the 400 operations of such a step take the host as long as the device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
BUCKET_STEP = 64  # beyond the last one
# Of steps with prompt chunks; larger ones keep the device busy for longer than the host takes to launch them (20 ms).
ROW_BUCKETS = (16, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 512, 640, 768, 1024)


class Adapted(IntEnum):
    """What adapters change in a step. Very few change the output projection, so that is a graph of its own, made when needed."""

    NOTHING = 0
    LAYERS = 1
    LAYERS_AND_HEAD = 2
    MANY_LAYERS = 3  # layers, by many pages: the kernels run in another order (`has_many_pages`)


class GraphKey(NamedTuple):
    """What a recorded step was made for: at most so many rows, one a sequence where `is_decode`. `is_short`: its prompt chunks
    have few keys (`Kernels.short_bound`)."""

    rows: int
    adapted: Adapted
    is_decode: bool = True
    is_short: bool = False


def buckets_for(max_sequences: int) -> tuple[int, ...]:
    """The batch sizes to record, ascending; the last one holds `max_sequences`."""
    sizes = [size for size in BUCKETS if size < max_sequences]
    at = bisect_left(BUCKETS, max_sequences)
    if at < len(BUCKETS):
        return (*sizes, BUCKETS[at])
    last = -(-max_sequences // BUCKET_STEP) * BUCKET_STEP
    return (*sizes, *range(BUCKETS[-1] + BUCKET_STEP, last + 1, BUCKET_STEP))


class StepGraphs:
    """Records a step once and replays it with the static memory it was recorded with.

    Args:
        run: Launches the step of a key; returns its results.
        buckets: Ascending batch sizes. row_buckets: ascending numbers of rows of steps with prompt chunks.
        is_recording: False: every step is launched anew.

    Attributes:
        last: The key of the step before.
    """

    def __init__(
        self,
        run: Callable[[GraphKey], tuple[Tensor, ...]],
        buckets: Sequence[int],
        row_buckets: Sequence[int] = (),
        *,
        is_recording: bool,
    ) -> None:
        self._run = run
        self._is_recording = is_recording
        self._graphs: dict[GraphKey, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # torch names its type differently in every release
        self.buckets = tuple(buckets)
        self.row_buckets = tuple(row_buckets)
        self.last: GraphKey | None = None

    def bucket(self, rows: int) -> int:
        """The smallest batch size that holds `rows` decoding sequences."""
        return self.buckets[bisect_left(self.buckets, rows)]

    def row_bucket(self, rows: int) -> int | None:
        """The smallest number of rows recorded for steps with prompt chunks that holds `rows`; None when none does."""
        at = bisect_left(self.row_buckets, rows)
        return self.row_buckets[at] if at < len(self.row_buckets) else None

    def step(self, key: GraphKey) -> tuple[Tensor, ...]:
        """Launch the step; its results stay valid until the next call."""
        self.last = key
        found = self._graphs.get(key)
        if found is not None:
            found[0].replay()
            return found[1]
        result = self._run(key)
        if self._is_recording:
            self.record(key)
        return result

    def record(self, key: GraphKey) -> None:
        """Record a step that has been launched before, so that everything it compiles or allocates once is there."""
        graph = torch.cuda.CUDAGraph()
        stream = self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        # Not torch.cuda.graph, which collects garbage and gives the allocator's memory back around each of 26 recordings.
        with torch.cuda.stream(stream):
            # Other threads may allocate and copy meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = self._run(key)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self._pool = self._pool or graph.pool()
        self._graphs[key] = graph, result
