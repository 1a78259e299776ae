"""Threads that bring adapters from verified files into pages, beside the step loop.

The step loop decides what is loaded and into which pages; these threads read, hash, convert and write. The pages belong to no
slot until the step loop takes the `Filled` outcome over, so a half-written page is never computed with.

The API process verified these files, but a file can be replaced between its check and this read. The record of every answer names
the hash, so it has to be the hash of what computed the answer.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from attribution.errors import AttributionError
from node.adapters.binding import LinearTable
from node.adapters.file_plan import FilePlan, FilePlans
from node.adapters.page_filler import Page, PageFiller
from node.adapters.page_reader import PageReader
from node.adapters.side import BaseWeights
from node.errors import AdapterChangedError, AdapterError, AdapterUnavailableError, EngineError
from node.kernels.layout import PageLayout
from node.kernels.lora import SideTensors

THREAD_COUNT = 2  # one reads headers and hashes while the other waits for its bytes


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What an adapter needs, known from its headers alone."""

    adapter_id: str
    directory: Path
    file: FilePlan


@dataclass(frozen=True, slots=True)
class Inspected:
    """The headers are read: pages can be chosen."""

    plan: AdapterPlan


@dataclass(frozen=True, slots=True)
class Placed:
    """All pages are complete, and whether they are the bytes the hash names is being computed: `Filled` or `Failed` follows."""

    plan: AdapterPlan


@dataclass(frozen=True, slots=True)
class Filled:
    """All pages are complete and are the bytes the hash names. `seconds` is the time of the thread that did it."""

    plan: AdapterPlan
    seconds: float
    side: SideTensors | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The adapter cannot be used."""

    adapter_id: str
    error: AdapterError


Outcome = Inspected | Placed | Filled | Failed
Job = Callable[[], Outcome]


class AdapterLoader:
    """Loader threads. All methods are for the step loop's thread and never wait, `close` apart.

    Args:
        layout: The model's pages.
        table: The model's linear modules.
        max_rank: Limit on ranks. max_bytes: limit on an adapter's file.
        base: The base's weights, for DoRA and adapters of the embedding; None refuses those.
        read_threads: Threads of one read with the compiled kernels. urgent_threads: of an urgent one.
        library: The compiled kernels; None reads with numpy.
        job_limit: Jobs not yet taken over; the caller keeps within it.
        wake: Called from a loader thread after each outcome, to end the step loop's idle wait.
    """

    def __init__(
        self,
        layout: PageLayout,
        table: LinearTable,
        *,
        max_rank: int,
        max_bytes: int,
        base: BaseWeights | None = None,
        read_threads: int = 1,
        urgent_threads: int = 1,
        library: Path | None = None,
        job_limit: int = 8,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._plans = FilePlans(layout, table, max_rank=max_rank, max_bytes=max_bytes)
        self._filler = PageFiller(layout, table, max_rank=max_rank, max_bytes=max_bytes, base=base)
        self._reader: PageReader | None = None
        if library is not None:
            self._reader = PageReader(
                library, layout, thread_count=read_threads, urgent_count=urgent_threads, max_bytes=max_bytes
            )
        self._wake = wake
        self._jobs: queue.Queue[tuple[str, Job] | None] = queue.Queue(job_limit + THREAD_COUNT)  # and each one's word to stop
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()  # bounded by job_limit: two of a job at most
        self.job_limit = job_limit
        self.job_count = 0
        self._threads = [threading.Thread(target=self._run, name=f"adapter-loader-{i}", daemon=True) for i in range(THREAD_COUNT)]
        for thread in self._threads:
            thread.start()

    def inspect(self, adapter_id: str, directory: Path) -> None:
        """Start reading an adapter's headers; the outcome is `Inspected` or `Failed`."""
        self._submit(adapter_id, lambda: Inspected(AdapterPlan(adapter_id, directory, self._plans.read(directory))))

    def fill(self, plan: AdapterPlan, pages: Sequence[Page], *, is_urgent: bool = False) -> None:
        """Start writing an adapter into `pages`, which nobody else touches until the outcome, `Filled` or `Failed`.

        Args:
            is_urgent: Somebody could go on with complete pages before they are hashed; where that can be, `Placed` says when.
        """
        self._submit(plan.adapter_id, lambda: self._fill(plan, pages, is_urgent=is_urgent))

    def outcomes(self, wait_s: float = 0.0) -> list[Outcome]:
        """Take over what is done; `wait_s`: how long to wait for the first where nothing is.

        Raises:
            EngineError: A thread died of a programming error; what it had in hand would never load.
        """
        found: list[Outcome] = []
        if wait_s > 0 and self._outcomes.empty():
            with contextlib.suppress(queue.Empty):
                found.append(self._outcomes.get(timeout=wait_s))
        while not self._outcomes.empty():
            found.append(self._outcomes.get_nowait())
        self.job_count -= sum(not isinstance(outcome, Placed) for outcome in found)
        if not all(thread.is_alive() for thread in self._threads):
            raise EngineError("an adapter loader thread is gone; the engine must be restarted", code="engine_failed")
        return found

    def close(self) -> None:
        """Finish the jobs at hand, drop the others and end the threads."""
        while not self._jobs.empty():
            try:
                self._jobs.get_nowait()
            except queue.Empty:  # a thread was faster
                break
        for _ in self._threads:
            self._jobs.put_nowait(None)
        for thread in self._threads:
            thread.join()
        if self._reader is not None:
            self._reader.close()

    def _submit(self, adapter_id: str, job: Job) -> None:
        if self.job_count >= self.job_limit:
            raise ValueError(f"{self.job_count} jobs are waiting for the adapter loader; the limit is {self.job_limit}")
        self.job_count += 1
        self._jobs.put_nowait((adapter_id, job))

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            adapter_id, job = item
            self._tell(_guarded(adapter_id, job))

    def _tell(self, outcome: Outcome) -> None:
        self._outcomes.put(outcome)
        self._wake()

    def _fill(self, plan: AdapterPlan, pages: Sequence[Page], *, is_urgent: bool) -> Outcome:
        """Fill, and refuse what is not the adapter that was asked for."""
        started = time.perf_counter()
        file, finish = plan.file, None
        if self._reader is not None and file.is_plain:
            if is_urgent and self._reader.can_place(file):
                roots = self._reader.place_then_hash(plan.directory, file, pages, lambda: self._tell(Placed(plan)))
            else:
                roots = self._reader.read(plan.directory, file, pages)
            found = file.adapter_id(roots)
        else:
            found, finish = self._filler.fill(plan.directory, file.binding, pages)
        if found != plan.adapter_id:
            raise AdapterChangedError(
                f"the adapter's files hash to {found} and {plan.adapter_id} was asked for; they changed after they were verified"
            )
        side = None if finish is None else finish()
        return Filled(plan, time.perf_counter() - started, side)


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
    except (MemoryError, torch.OutOfMemoryError):
        message = "there is no memory now for what is computed when this adapter is loaded; ask again later"
        return Failed(adapter_id, AdapterUnavailableError(message))
    except OSError as error:
        message = f"the adapter's files cannot be read (errno {error.errno}); check the adapter cache"
        return Failed(adapter_id, AdapterUnavailableError(message))
