"""A thread that brings adapters from verified files into pages, beside the step loop.

The step loop decides what is loaded and into which pages; this thread reads, hashes, converts and writes. Its pages belong to no
slot until the step loop takes the `Filled` outcome over, so a half-written page is never computed with.
Everything is numpy: it releases the interpreter lock while it copies, and starts no second pool of compute threads.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attribution import identity
from attribution.errors import AttributionError
from node.adapters.binding import Binding, BoundModule, LinearTable, bind
from node.adapters.formats.opening import TensorFile, open_adapter
from node.adapters.lora_config import LoraConfig
from node.adapters.safetensors_file import TensorEntry
from node.adapters.side import BaseWeights, SideBuilder, side_bytes
from node.errors import AdapterChangedError, AdapterError, AdapterUnavailableError, EngineError
from node.kernels.layout import ModuleSpan, PageLayout
from node.kernels.lora import SideTensors

Page = npt.NDArray[Any]  # [page_elements] float32, or uint16 holding the bits of bfloat16


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What an adapter needs, known from its headers alone. `rank` is its largest; it decides the number of pages.

    `side_bytes` is what it takes beside its pages, on the same device (see `side`); 0 for most.
    """

    adapter_id: str
    directory: Path
    config: LoraConfig
    binding: Binding
    rank: int
    side_bytes: int = 0

    @property
    def modules(self) -> tuple[BoundModule, ...]:
        return self.binding.modules


@dataclass(frozen=True, slots=True)
class Inspected:
    """The headers are read: pages can be chosen."""

    plan: AdapterPlan


@dataclass(frozen=True, slots=True)
class Filled:
    """All pages are complete and are the bytes the hash names. `seconds` is the time of this thread."""

    plan: AdapterPlan
    seconds: float
    side: SideTensors | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The adapter cannot be used."""

    adapter_id: str
    error: AdapterError


Outcome = Inspected | Filled | Failed
Job = Callable[[], Outcome]


class AdapterLoader:
    """One loader thread. All methods are for the step loop's thread and never wait, `close` apart.

    Args:
        layout: The model's pages.
        table: The model's linear modules.
        max_rank: Limit on ranks. max_bytes: limit on an adapter's file.
        base: The base's weights, for DoRA and adapters of the embedding; None refuses those.
        job_limit: Jobs not yet taken over; the caller keeps within it.
        wake: Called from the loader thread after each outcome, to end the step loop's idle wait.
    """

    def __init__(
        self,
        layout: PageLayout,
        table: LinearTable,
        *,
        max_rank: int,
        max_bytes: int,
        base: BaseWeights | None = None,
        job_limit: int = 8,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._layout = layout
        self._table = table
        self._max_rank = max_rank
        self._max_bytes = max_bytes
        self._base = base
        self._wake = wake
        self._jobs: queue.Queue[tuple[str, Job] | None] = queue.Queue(job_limit + 1)  # one more for the word to stop
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()  # bounded by job_limit
        self.job_limit = job_limit
        self.job_count = 0
        self._thread = threading.Thread(target=self._run, name="adapter-loader", daemon=True)
        self._thread.start()

    def inspect(self, adapter_id: str, directory: Path) -> None:
        """Start reading an adapter's headers; the outcome is `Inspected` or `Failed`."""
        self._submit(adapter_id, lambda: self._inspect(adapter_id, directory))

    def fill(self, plan: AdapterPlan, pages: Sequence[Page]) -> None:
        """Start writing an adapter into `pages`, which nobody else touches until the outcome, `Filled` or `Failed`."""
        self._submit(plan.adapter_id, lambda: self._fill(plan, pages))

    def outcomes(self) -> list[Outcome]:
        """Take over what is done.

        Raises:
            EngineError: The thread died of a programming error; nothing would ever load again.
        """
        found: list[Outcome] = []
        while not self._outcomes.empty():
            found.append(self._outcomes.get_nowait())
        self.job_count -= len(found)
        if not self._thread.is_alive():
            raise EngineError("the adapter loader thread is gone; the engine must be restarted", code="engine_failed")
        return found

    def close(self) -> None:
        """Finish the job at hand, drop the others and end the thread."""
        while not self._jobs.empty():
            self._jobs.get_nowait()
        self._jobs.put_nowait(None)
        self._thread.join()

    def _submit(self, adapter_id: str, job: Job) -> None:
        if self.job_count >= self.job_limit:
            raise ValueError(f"{self.job_count} jobs are waiting for the adapter loader; the limit is {self.job_limit}")
        self.job_count += 1
        self._jobs.put_nowait((adapter_id, job))

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            adapter_id, job = item
            self._outcomes.put(_guarded(adapter_id, job))
            self._wake()

    def _inspect(self, adapter_id: str, directory: Path) -> Outcome:
        with open_adapter(directory, self._table.shapes, max_rank=self._max_rank, max_bytes=self._max_bytes) as adapter:
            binding = bind(adapter.file.entries, adapter.config, self._table)
        needed = binding.page_rank_needed
        return Inspected(AdapterPlan(adapter_id, directory, adapter.config, binding, needed, side_bytes(binding, 4)))

    def _fill(self, plan: AdapterPlan, pages: Sequence[Page]) -> Outcome:
        """Copy every tensor into the pages, hashing the very bytes that are copied.

        The API process verified these files, but a file can be replaced between its check and this read. The record of every
        answer names the hash, so it has to be the hash of what computed the answer. SHA-256 runs at 1.8 GB/s, off the step loop.
        """
        started = time.perf_counter()
        is_float = not pages or pages[0].dtype == np.float32
        side = SideBuilder(plan.binding, self._layout, self._base, torch.float32 if is_float else torch.bfloat16)
        with open_adapter(plan.directory, self._table.shapes, max_rank=self._max_rank, max_bytes=self._max_bytes) as adapter:
            writers = _writers(plan, self._layout, pages)
            tensors = [_hashed(adapter.file, entry, writers, side) for entry in adapter.file.entries.values()]
            found = identity.adapter_id(tensors, adapter.config.raw, threads=1)
        if found != plan.adapter_id:
            raise AdapterChangedError(
                f"the adapter's files hash to {found} and {plan.adapter_id} was asked for; they changed after they were verified"
            )

        def write_b(module: BoundModule, values: npt.NDArray[np.float32]) -> None:
            _matrix_writer(pages, self._layout.page_rank, self._layout.spans[module.name], is_b=True)(values, "F32")

        return Filled(plan, time.perf_counter() - started, side.finish(write_b))


def _guarded(adapter_id: str, job: Job) -> Outcome:
    """Run a job; what is wrong with an adapter concerns that adapter only."""
    try:
        return job()
    except AdapterError as error:
        return Failed(adapter_id, error)
    except AttributionError:
        return Failed(
            adapter_id, AdapterChangedError("the adapter's files can no longer be hashed; they changed after verification")
        )
    except OSError as error:
        message = f"the adapter's files cannot be read (errno {error.errno}); check the adapter cache"
        return Failed(adapter_id, AdapterUnavailableError(message))


Writer = Callable[[npt.NDArray[Any], str], None]


def _writers(plan: AdapterPlan, layout: PageLayout, pages: Sequence[Page]) -> dict[str, list[Writer]]:
    """For every tensor of the file that pages hold, the functions that write it; one tensor may serve several fused modules."""
    writers: dict[str, list[Writer]] = {}
    for module in plan.modules:
        span = layout.spans[module.name]
        writers.setdefault(module.a_tensor, []).append(_matrix_writer(pages, layout.page_rank, span, is_b=False))
        if module.magnitude_tensor is None:  # DoRA's B is written when its gain is known
            write = _matrix_writer(pages, layout.page_rank, span, is_b=True, first_row=module.first_row)
            writers.setdefault(module.b_tensor, []).append(write)
    return writers


def _matrix_writer(pages: Sequence[Page], page_rank: int, span: ModuleSpan, *, is_b: bool, first_row: int = 0) -> Writer:
    offset, width = (span.b_offset, span.out_features) if is_b else (span.a_offset, span.in_features)

    def write(values: npt.NDArray[Any], dtype: str) -> None:
        part_of_b = values[first_row : first_row + width] if is_b else values
        rows = convert(part_of_b, dtype, pages[0].dtype)
        rows = rows.T if is_b else rows  # pages are rank-major; the file has B as [out_features, rank]
        for index, page in enumerate(pages):
            part = rows[index * page_rank : (index + 1) * page_rank]
            page[offset : offset + part.shape[0] * width].reshape(part.shape)[...] = part

    return write


def _hashed(file: TensorFile, entry: TensorEntry, writers: dict[str, list[Writer]], side: SideBuilder) -> identity.TensorEntry:
    """A tensor that is written into its pages when it is read for the hash, so that each byte is fetched once."""

    def read() -> bytes:
        values = file.read(entry.name)
        if entry.name not in writers and not side.wants(entry.name):
            raise AdapterChangedError(f"tensor {entry.name[:200]!r} is new; the adapter's files changed after they were verified")
        for write in writers.get(entry.name, ()):
            write(values, entry.dtype)
        if side.wants(entry.name):
            side.take(entry.name, values)
        return values.tobytes()

    return identity.TensorEntry(entry.name, entry.dtype, entry.shape, read)


def convert(values: npt.NDArray[Any], dtype: str, target: np.dtype[Any]) -> npt.NDArray[Any]:
    """Convert file values to page values.

    Args:
        values: As `SafetensorsFile.read` gives them. dtype: "F32", "F16" or "BF16".
        target: float32, or uint16 for the bits of bfloat16 (rounded to nearest even, as torch does).
    """
    if target == np.uint16:
        return values if dtype == "BF16" else to_bfloat16_bits(values.astype(np.float32, copy=False))
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def to_bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of finite float32 values rounded to bfloat16, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (rounded >> np.uint32(16)).astype(np.uint16)
