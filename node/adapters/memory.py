"""Builds the adapter memory of an engine: loader threads, the tiers of this device, the pool that decides."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from node.adapters.binding import LinearTable
from node.adapters.loader import AdapterLoader
from node.adapters.page_store import HostPages, count_pages
from node.adapters.pool import AdapterPool
from node.adapters.side import BaseWeights
from node.config import AdapterSettings
from node.kernels.build import library_path
from node.kernels.layout import PageLayout

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
SPARE_CORES = 4  # of a GPU's host: step loop, HTTP, what the driver runs
MAX_READ_THREADS = 16


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """Bounds from the settings; see `AdapterSettings`.

    Attributes:
        memory_bytes: Of the pages that steps compute from. host_memory_bytes: of the tier before them; unused on a CPU.
        max_rank: The largest rank served. max_adapter_bytes: of one adapter's file.
    """

    memory_bytes: int
    host_memory_bytes: int
    max_rank: int
    max_adapter_bytes: int


@dataclass(frozen=True, slots=True)
class SharedPages:
    """[P, at least page_elements] on a GPU, of which those from `first_page` on are adapter pages at first."""

    array: Tensor
    first_page: int


def memory_limits(settings: AdapterSettings, memory_bytes: int) -> MemoryLimits:
    """The settings, with what they leave open.

    Args:
        memory_bytes: What steps compute from; see `node.engine.sizing`.
    """
    host_bytes = settings.host_memory_bytes
    if host_bytes is None:
        host_bytes = min(2 * memory_bytes, machine_bytes() // 4)
    return MemoryLimits(memory_bytes, host_bytes, settings.max_rank, settings.max_adapter_bytes)


def machine_bytes() -> int:
    """Memory of this machine, or of the container this process runs in."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = CGROUP_LIMIT.read_text().strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdigit() else machine


def open_pool(
    layout: PageLayout,
    table: LinearTable,
    dtype: torch.dtype,
    limits: MemoryLimits,
    *,
    device: torch.device,
    base: BaseWeights | None = None,
    wake: Callable[[], None] = lambda: None,
    shared: SharedPages | None = None,
    allocate_host: Callable[[int], torch.Tensor] | None = None,
) -> AdapterPool:
    """Allocate adapter memory and start its loader.

    Args:
        layout: The model's pages. table: its linear modules.
        dtype: Of the pages: float32 or bfloat16.
        device: Where steps run. On CUDA, steps are launched on the stream that is current now.
        base: The base's weights, for DoRA and adapters of the embedding; None refuses those.
        wake: Called from a loader thread when an adapter changed its state.
        shared: A GPU's pages that lie among something else; None allocates them.
        allocate_host: Of `pinned_beside`; None waits until the memory before a GPU's is there.

    Raises:
        ConfigError: Not one page fits into a limit, or host memory cannot be page-locked.
    """
    core_count = len(os.sched_getaffinity(0))
    loader = AdapterLoader(
        layout,
        table,
        max_rank=limits.max_rank,
        max_bytes=limits.max_adapter_bytes,
        base=base,
        read_threads=read_threads(device.type, core_count),
        urgent_threads=read_threads(device.type, core_count + SPARE_CORES),  # while no step runs
        library=library_path(),
        wake=wake,
    )
    try:
        if device.type != "cuda":
            pages = HostPages(layout, dtype, memory_bytes=limits.memory_bytes, max_rank=limits.max_rank)
            return AdapterPool(layout, pages, loader)
        if shared is None:
            page_count = count_pages(layout, dtype, limits.memory_bytes)
            shared = SharedPages(torch.zeros((page_count, layout.page_elements), dtype=dtype, device=device), 0)
        return _open_device_pool(layout, shared, limits, loader, allocate_host)
    except BaseException:
        loader.close()
        raise


def read_threads(device_type: str, core_count: int) -> int:
    """Threads of one read. A CPU computes with its cores and is not to be disturbed; a GPU's host has most of them idle."""
    if device_type != "cuda":
        return 1
    return max(1, min(core_count - SPARE_CORES, MAX_READ_THREADS))


def _open_device_pool(
    layout: PageLayout,
    shared: SharedPages,
    limits: MemoryLimits,
    loader: AdapterLoader,
    allocate_host: Callable[[int], torch.Tensor] | None,
) -> AdapterPool:
    from node.adapters.device_pages import CudaPages
    from node.adapters.host_arena import HostArena
    from node.adapters.pinned import allocate_pinned

    array = shared.array
    pages = CudaPages(
        layout,
        array,
        max_rank=limits.max_rank,
        compute=torch.cuda.current_stream(array.device),
        first_page=shared.first_page,
    )
    arena = HostArena(layout, array.dtype, memory_bytes=limits.host_memory_bytes, allocate=allocate_host or allocate_pinned)
    return AdapterPool(layout, pages, loader, arena)
