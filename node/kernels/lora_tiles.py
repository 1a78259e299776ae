"""The LoRA work of a step for the CUDA kernels: rows that share a recipe, cut into tiles, as one run of int32.

Host arithmetic in numpy, done only when the batch's membership changes. `csrc/cuda/lora_work.h` describes the run's layout.

Shape letters: T rows (tokens), Q sequences, S slots, V (row, entry) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Recipe = Sequence[tuple[int, float]]  # (slot, weight) in the order in which they are summed

HEADER_INTS, TILE_INTS, ENTRY_INTS, ITEM_INTS = 16, 8, 4, 8
MAX_ENTRIES = (1 << 15) - 1  # of one recipe: a tile keeps its count in 16 bits, signed where numpy packs it


@dataclass(frozen=True, slots=True)
class TileBlock:
    """The tiles of one step.

    Attributes:
        data: int32, see `csrc/cuda/lora_work.h`. Copy it to the start of the device's block; what lies behind it is not read.
        tile_count: Tiles, those without adapters among them.
        item_count: (tile, entry) pairs: what a shrink computes; 0 when no row uses an adapter.
        pair_count: V: what `v` [V, modules, 16] must hold at least.
    """

    data: Ints
    tile_count: int
    item_count: int
    pair_count: int


def build_tiles(recipes: Sequence[Recipe], counts: Sequence[int], slot_pages: Ints, tile_rows: int) -> TileBlock:
    """Cut the rows of a step into tiles of one recipe each.

    Recipes keep the order of their first row and rows keep theirs; entries run in recipe order, then in page order, so a row's
    delta is summed in the same order in every batch.

    Args:
        recipes: Of each sequence; empty where it uses no adapter.
        counts: Consecutive rows of each sequence, from row 0 on.
        slot_pages: [S, max_pages]. Pages of every slot in rank order; unused ones are -1 and come last.
        tile_rows: Rows a tile may have: 16, 32 or 64.

    Raises:
        ValueError: A recipe has more pages than a tile can count.
    """
    groups = _rows_by_recipe(recipes, counts)
    rows = np.concatenate([np.zeros(0, np.int32), *groups.values()]).astype(np.int32)
    entries = [_entries(recipe, slot_pages) for recipe in groups]
    table = np.concatenate([np.zeros((0, ENTRY_INTS), np.int32), *entries])
    tiles = _tiles([len(places) for places in groups.values()], [len(found) for found in entries], tile_rows)
    row_counts, per_tile = tiles[:, 1] & 0xFFFF, tiles[:, 1] >> 16
    pairs = per_tile * row_counts
    tiles[:, 3] = np.cumsum(pairs) - pairs
    has_entries = per_tile > 0
    tiles[has_entries, 4:] = table[tiles[has_entries, 2]]
    items = _items(tiles, per_tile, table)
    pair_count = int(pairs.sum())
    tile_of = np.repeat(np.arange(len(tiles), dtype=np.int32), row_counts)
    counts_of = [len(tiles), len(items), len(rows), pair_count]
    data = _join([tiles, rows, table, items, tile_of], counts_of, int(row_counts.max(initial=0)))
    return TileBlock(data, len(tiles), len(items), pair_count)


def block_ints(rows: int, sequences: int, entries: int, tile_rows: int) -> int:
    """The most int32 that `build_tiles` can need.

    Args:
        rows: T at most. sequences: Q at most.
        entries: Pages of one row's recipe at most.
        tile_rows: As given to `build_tiles`.
    """
    tiles = min(rows, -(-rows // tile_rows) + sequences)
    table = ENTRY_INTS * min(rows, sequences) * entries
    parts = (HEADER_INTS, TILE_INTS * tiles, rows, table, ITEM_INTS * tiles * entries, rows)
    return sum(_aligned(part) for part in parts)


def _rows_by_recipe(recipes: Sequence[Recipe], counts: Sequence[int]) -> dict[tuple[tuple[int, float], ...], Ints]:
    """Rows of each distinct recipe, recipes in order of their first row."""
    spans: dict[tuple[tuple[int, float], ...], list[Ints]] = {}
    first = 0
    for recipe, count in zip(recipes, counts, strict=True):
        if count:
            spans.setdefault(tuple(recipe), []).append(np.arange(first, first + count, dtype=np.int32))
        first += count
    return {recipe: np.concatenate(parts) for recipe, parts in spans.items()}


def _entries(recipe: Recipe, slot_pages: Ints) -> Ints:
    """[pages of the recipe, 4] int32: page, slot, ordinal, weight bits."""
    parts = [np.zeros((0, ENTRY_INTS), np.int32)]
    for slot, weight in recipe:
        pages = slot_pages[slot][slot_pages[slot] >= 0]
        part = np.empty((len(pages), ENTRY_INTS), np.int32)
        part[:, 0] = pages
        part[:, 1] = slot
        part[:, 2] = np.arange(len(pages))
        part[:, 3] = np.float32(weight).view(np.int32)
        parts.append(part)
    found = np.concatenate(parts)
    if len(found) > MAX_ENTRIES:
        raise ValueError(f"a recipe of {len(recipe)} adapters has {len(found)} pages; a tile counts at most {MAX_ENTRIES}")
    return found


def _tiles(row_counts: Sequence[int], entry_counts: Sequence[int], tile_rows: int) -> Ints:
    """[tiles, 8] int32: first place, rows | entries << 16, first entry; the rest is for the caller to fill in."""
    tiles: list[tuple[int, int, int]] = []
    place = entry = 0
    for row_count, entry_count in zip(row_counts, entry_counts, strict=True):
        for first in range(0, row_count, tile_rows):
            tiles.append((place + first, min(tile_rows, row_count - first) | entry_count << 16, entry))
        place += row_count
        entry += entry_count
    found = np.zeros((len(tiles), TILE_INTS), np.int32)
    found[:, :3] = np.array(tiles, dtype=np.int32).reshape(len(tiles), 3)
    return found


def _items(tiles: Ints, per_tile: Ints, table: Ints) -> Ints:
    """[items, 8] int32: first place, rows | entries << 16, first pair, entry of the tile; then the entry itself."""
    items = np.empty((int(per_tile.sum()), ITEM_INTS), np.int32)
    items[:, :3] = np.repeat(tiles[:, [0, 1, 3]], per_tile, axis=0)
    items[:, 3] = np.arange(len(items)) - np.repeat(np.cumsum(per_tile) - per_tile, per_tile)
    items[:, 4:] = table[np.repeat(tiles[:, 2], per_tile) + items[:, 3]]
    return items


def _join(sections: Sequence[Ints], counts: Sequence[int], largest: int) -> Ints:
    """Header and sections in one run, each section at a multiple of 16 bytes."""
    offsets = np.cumsum([HEADER_INTS, *(_aligned(section.size) for section in sections)])
    data = np.zeros(int(offsets[-1]), np.int32)
    data[:10] = [*counts, *offsets[:4], largest, offsets[4]]
    for offset, section in zip(offsets, sections, strict=False):
        data[offset : offset + section.size] = section.ravel()
    return data


def _aligned(ints: int) -> int:
    return -(-ints // 4) * 4
