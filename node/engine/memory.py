"""Opens the memory of an engine: keys and values, adapters, and on a GPU the border between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from node.adapters.binding import LinearTable
from node.adapters.memory import SharedPages, memory_limits, open_pool
from node.adapters.pool import AdapterPool
from node.config import AdapterSettings, EngineSettings
from node.engine.blocks import BlockPool
from node.engine.border import Border
from node.engine.sizing import MemorySizes
from node.models.device_memory import DeviceMemory, allocate_memory
from node.models.inputs import KVCache
from node.models.load import LoadedModel, make_kv_cache


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Everything that a step reads and writes besides the model.

    Attributes:
        kv: The cache; on a GPU with a movable border it reaches over all memory, adapter pages included.
        blocks: Which of its blocks are whose.
        adapters: Adapter memory.
    """

    kv: KVCache
    blocks: BlockPool
    adapters: AdapterPool

    def longest(self, max_model_len: int) -> int:
        """Tokens of a sequence: as many as the model takes, and never more than the whole cache."""
        return min(max_model_len, self.blocks.block_limit * self.kv.block_size)


def open_memory(
    loaded: LoadedModel,
    settings: EngineSettings,
    adapter_settings: AdapterSettings,
    sizes: MemorySizes,
    block_size: int,
    device: torch.device,
    wake: Callable[[], None],
    allocate_host: Callable[[int], torch.Tensor] | None = None,
) -> EngineMemory:
    """Allocate the memory and start the adapter loader.

    Args:
        sizes: See `node.engine.sizing`; with a movable border, what each side begins with.
        block_size: Tokens of a KV block.
        wake: Called from a loader thread when an adapter changed its state.
        allocate_host: See `node.adapters.memory.open_pool`.

    Raises:
        ConfigError, ModelLoadError: A size is too small for this model.
    """
    is_shared = device.type == "cuda" and settings.movable_border
    units = _units(loaded, sizes, block_size, device) if is_shared else None
    if units is None:
        kv = make_kv_cache(loaded.spec, sizes.kv_cache_bytes, block_size, loaded.dtype, device)
        block_count = kv.block_count
    else:
        kv, block_count = units.kv_cache(loaded.spec, block_size), units.kv_block_count
    adapters = open_pool(
        loaded.layout,
        LinearTable(loaded.spec.linear_kinds),
        loaded.dtype,
        memory_limits(adapter_settings, sizes.adapter_bytes),
        device=device,
        base=loaded.model,
        wake=wake,
        allocate_host=allocate_host,
        shared=None if units is None else SharedPages(units.array, units.kv_units),
    )
    blocks = BlockPool(block_count, block_size, settings.prefix_cache, capacity=kv.block_count)
    if units is not None:
        border = Border(blocks, adapters, units.shape.unit_blocks)
        blocks.borrow_from(border.lend_blocks)
        adapters.borrow_from(border.lend_pages)
    return EngineMemory(kv, blocks, adapters)


def _units(loaded: LoadedModel, sizes: MemorySizes, block_size: int, device: torch.device) -> DeviceMemory:
    return allocate_memory(
        loaded.spec,
        loaded.layout,
        block_size,
        loaded.dtype,
        device,
        kv_bytes=sizes.kv_cache_bytes,
        adapter_bytes=sizes.adapter_bytes,
    )
