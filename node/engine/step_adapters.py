"""The adapters of a GPU's step, as tiles of rows that share a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from node.engine.device_batch import recipes_of
from node.engine.graphs import Adapted
from node.engine.runner import SlotTable
from node.engine.sizing import DeviceSizes
from node.engine.step_block import BlockLayout, StepBlock
from node.engine.step_plan import Work
from node.kernels.build import library_path
from node.kernels.cuda_ops import DeviceTiles
from node.kernels.device_rows import DeviceRows, has_many_pages
from node.kernels.lora import LoraPool, LoraRows, lora_rows
from node.kernels.lora_tiles import Ints, Recipe, TileBlock, block_ints
from node.kernels.tile_builder import TileBuilder

TILE_ROWS = 16


class DeviceSlots(SlotTable, Protocol):
    """Where resident adapters are, and what the host knows of them."""

    @property
    def layer_ranks(self) -> Ints:
        """[S] int32: a slot's ranks where all modules of all layers have the same, else 0."""
        ...

    def adapts(self, adapter_id: str, module: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class Members:
    """The adapters of a decode batch, which stay the same as long as its members do. `tiles`: None where it names none."""

    key: tuple[int, ...]
    tiles: TileBlock | None
    adapted: Adapted


@dataclass(frozen=True, slots=True)
class StepTiles:
    """The tiles of a step with prompt chunks.

    Attributes:
        rows: Of all its rows.
        wanted: Of those that want logits, where they are not all; None where they use no adapter.
        wanted_count: How many rows that are.
        has_head: An adapter of the rows that want logits changes the output projection.
    """

    rows: TileBlock
    wanted: TileBlock | None
    wanted_count: int
    has_head: bool

    @property
    def blocks(self) -> tuple[TileBlock, ...]:
        """As they are sent, one behind the other."""
        return (self.rows,) if self.wanted is None else (self.rows, self.wanted)

    @property
    def size(self) -> int:
        """int32 of the blocks."""
        return sum(len(block.data) for block in self.blocks)

    def write(self, host: Ints, at: int) -> None:
        """Write the blocks at `at`."""
        for block in self.blocks:
            host[at : at + len(block.data)] = block.data
            at += len(block.data)


class StepAdapters:
    """Builds tiles on the host and finds them on the device.

    Args:
        slots: adapter memory. head_module: the output projection's row in `LoraPool.ranks`.
        processors: of the GPU.
    """

    def __init__(self, slots: DeviceSlots, head_module: int, processors: int) -> None:
        self._slots = slots
        self._head_module = head_module
        self._tiles = TileBuilder(TILE_ROWS, processors, library_path())

    @property
    def tensors(self) -> LoraPool:
        """What kernels read."""
        return self._slots.tensors

    def slot_of(self, adapter_id: str) -> int:
        return self._slots.slot_of(adapter_id)

    def members(self, work: Sequence[Work], key: tuple[int, ...]) -> Members:
        """Of a decode batch, one row a sequence."""
        recipes = recipes_of(work, self.slot_of)
        if not any(recipes):
            return Members(key, None, Adapted.NOTHING)
        has_head = self._has_head(work)
        tiles = self._build(recipes, [1] * len(work), with_head=has_head)
        return Members(key, tiles, Adapted.LAYERS_AND_HEAD if has_head else adapted_of(len(work), tiles))

    def row_tiles(self, work: Sequence[Work]) -> StepTiles | None:
        """The tiles of any step; None where it names no adapter."""
        recipes = recipes_of(work, self.slot_of)
        if not any(recipes):
            return None
        counts, wanted = [item.count for item in work], [item.logit_count for item in work]
        has_head = self._has_head([item for item in work if item.logit_count])
        if counts == wanted:
            return StepTiles(self._build(recipes, counts, with_head=has_head), None, sum(wanted), has_head)
        last: list[Recipe] = [recipe for recipe, count in zip(recipes, wanted, strict=True) if count]
        found = self._build(last, [count for count in wanted if count], with_head=has_head) if any(last) else None
        return StepTiles(self._build(recipes, counts, with_head=False), found, sum(wanted), has_head)

    def plain_rows(self, work: Sequence[Work]) -> LoraRows | None:
        """The same for kernels that take no tiles."""
        return lora_rows(recipes_of(work, self.slot_of), [item.count for item in work])

    def _build(self, recipes: Sequence[Recipe], counts: Sequence[int], *, with_head: bool) -> TileBlock:
        """with_head: the output projection reads them as well. It has its own ranks, mostly none."""
        pages, ranks = self.tensors.slot_pages.numpy(), self._slots.layer_ranks
        slot_ranks = np.zeros_like(ranks) if with_head else ranks
        return self._tiles.build(recipes, counts, pages, slot_ranks)

    def _has_head(self, work: Sequence[Work]) -> bool:
        named = {term.adapter_id for item in work for term in item.sequence.terms}
        return any(self._slots.adapts(adapter_id, self._head_module) for adapter_id in named)


def adapted_of(rows: int, tiles: TileBlock) -> Adapted:
    """What adapters change in a step whose output projection they leave alone."""
    return Adapted.MANY_LAYERS if has_many_pages(rows, tiles.item_count) else Adapted.LAYERS


def most_tile_ints(sizes: DeviceSizes, sequences: int, entries: int) -> int:
    """int32 that the tiles of a step can need, whatever its size. entries: of one row's recipe."""
    return block_ints(sizes.max_batch_tokens, sequences, entries, TILE_ROWS, sizes.processors)


def sent_rows(block: StepBlock, layout: BlockLayout, tiles: StepTiles | None) -> DeviceRows | None:
    """Tiles that were sent behind a step's other metadata, one block after another."""
    if tiles is None:
        return None
    wanted = None
    if tiles.wanted is not None:
        at, has_many = layout.tiles + len(tiles.rows.data), has_many_pages(tiles.wanted_count, tiles.wanted.item_count)
        wanted = DeviceRows(_view(block, at, tiles.wanted), tiles.wanted.pair_count, has_many, tiles.has_head)
    has_many = has_many_pages(layout.rows, tiles.rows.item_count)
    return DeviceRows(_view(block, layout.tiles, tiles.rows), tiles.rows.pair_count, has_many, tiles.has_head, wanted)


def _view(block: StepBlock, at: int, tiles: TileBlock) -> DeviceTiles:
    return DeviceTiles(block.view(at, len(tiles.data)), TILE_ROWS)


def static_rows(block: StepBlock, layout: BlockLayout, adapted: Adapted, pairs: int) -> DeviceRows | None:
    """Tiles of a recorded step, whatever they will be: all the memory behind its other metadata, and room for `pairs` pairs."""
    if adapted is Adapted.NOTHING:
        return None
    tiles = DeviceTiles(block.view(layout.tiles, block.capacity - layout.tiles), TILE_ROWS)
    is_many, is_head = adapted is Adapted.MANY_LAYERS, adapted is Adapted.LAYERS_AND_HEAD
    return DeviceRows(tiles, pairs, has_many=is_many, has_head=is_head)
