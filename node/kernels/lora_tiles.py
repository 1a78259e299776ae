"""The LoRA work of a step for the CUDA kernels: rows that share a recipe, cut into tiles, as one run of int32.

Host arithmetic in numpy, done only when the batch's membership changes. `csrc/cuda/lora_work.h` describes the run's layout.

Shape letters: T rows (tokens), Q sequences, S slots, M modules, V (row, entry) pairs, P the GPU's processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from node.kernels.lora_deal import Longs, TileColumns, before, deal_ints, is_long, norm_deal, stream_deal, wide_rows
from node.kernels.lora_long import LONG_STEP_ROWS, LongItems, RecipeRows, long_items

Ints = npt.NDArray[np.int32]
Recipe = Sequence[tuple[int, float]]  # (slot, weight) in the order in which they are summed

HEADER_INTS, TILE_INTS, ENTRY_INTS, ITEM_INTS = 32, 8, 4, 8
LINE_INTS = 32  # of 128 bytes: a block's share stands in one, so the run must begin at one and end before one
TILE_PAGE_RANK = 16  # ranks of a page on a GPU
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


def build_tiles(
    recipes: Sequence[Recipe], counts: Sequence[int], slot_pages: Ints, tile_rows: int, *, processors: int, slot_ranks: Ints
) -> TileBlock:
    """Cut the rows of a step into tiles of one recipe each, and deal them to blocks.

    Recipes keep the order of their first row and rows keep theirs; entries run in recipe order, then in page order, so a row's
    delta is summed in the same order in every batch.

    Args:
        recipes: Of each sequence; empty where it uses no adapter.
        counts: Consecutive rows of each sequence, from row 0 on.
        slot_pages: [S, max_pages]. Pages of every slot in rank order; unused ones are -1 and come last.
        tile_rows: Rows a tile may have; the kernels take at most 16.
        processors: P.
        slot_ranks: [S]. The ranks of a slot where all modules that the step computes have the same, else 0.

    Raises:
        ValueError: A recipe has more pages than a tile can count.
    """
    found = _group_rows(recipes, counts)
    table, entry_counts = _entries(found.recipes, slot_pages, slot_ranks)
    tiles, row_counts, per_tile = _tiles(found.row_counts, entry_counts, table, tile_rows)
    columns = streamed = TileColumns(tiles, row_counts, per_tile, found.rows)
    if is_long(len(found.rows), processors):
        streamed = TileColumns(*_tiles(found.row_counts, entry_counts, table, wide_rows(found.row_counts)), found.rows)
    items = _items(tiles, per_tile, table)
    long = long_items(RecipeRows(found.row_counts, entry_counts, table), processors)
    pair_count = int((row_counts * per_tile).sum())
    data = _join(_Parts(columns, streamed, items, table, long, pair_count, processors))
    return TileBlock(data, len(tiles), len(items), pair_count)


def empty_tiles(processors: int) -> Ints:
    """The start of a run that counts no tiles and gives no block anything to do: all that a kernel reads of it."""
    return build_tiles([], [], np.zeros((0, 1), np.int32), 1, processors=processors, slot_ranks=np.zeros(0, np.int32)).data


def same_ranks(ranks: Ints) -> Ints:
    """`slot_ranks` of a table [M, S] of all modules: [S] int32."""
    return np.where((ranks == ranks[:1]).all(axis=0), ranks[0], 0).astype(np.int32)


def block_ints(rows: int, sequences: int, entries: int, tile_rows: int, processors: int) -> int:
    """The most int32 that `build_tiles` can need.

    Args:
        rows: T at most. sequences: Q at most.
        entries: Pages of one row's recipe at most.
        tile_rows, processors: As given to `build_tiles`.
    """
    tiles = min(rows, -(-rows // tile_rows) + sequences)
    table = ENTRY_INTS * min(rows, sequences) * entries
    items = ITEM_INTS * tiles * entries
    long = items if rows > LONG_STEP_ROWS else 0
    streamed = TILE_INTS * tiles if is_long(rows, processors) else 0
    parts = (HEADER_INTS, deal_ints(processors), items, TILE_INTS * tiles, rows, table, rows, long, streamed)
    return aligned_ints(sum(aligned_ints(part) for part in parts), LINE_INTS)


@dataclass(frozen=True, slots=True)
class _Grouped:
    """Distinct recipes in order of their first row, how many rows have each, and the rows of one after those of another."""

    recipes: list[tuple[tuple[int, float], ...]]
    row_counts: Longs
    rows: Ints


def _group_rows(recipes: Sequence[Recipe], counts: Sequence[int]) -> _Grouped:
    numbers: dict[tuple[tuple[int, float], ...], int] = {}
    number = [
        numbers.setdefault(tuple(recipe), len(numbers)) if count else -1 for recipe, count in zip(recipes, counts, strict=True)
    ]
    order = np.argsort(np.array(number, np.int64), kind="stable")
    sizes = np.array(counts, np.int64)
    first = before(sizes)
    sizes, first, group = sizes[order], first[order], np.array(number, np.int64)[order]
    total = int(sizes.sum())
    rows = np.arange(total) + np.repeat(first - before(sizes), sizes)
    of_rows = np.repeat(group, sizes)
    return _Grouped(list(numbers), np.bincount(of_rows, minlength=len(numbers)), rows.astype(np.int32))


def _entries(recipes: Sequence[Recipe], slot_pages: Ints, slot_ranks: Ints) -> tuple[Ints, Longs]:
    """[entries, 4] int32 of all recipes: page, slot, ordinal | ranks of every module << 16, weight bits; entries of each."""
    slots = np.array([slot for recipe in recipes for slot, _ in recipe], np.int64)
    weights = np.array([weight for recipe in recipes for _, weight in recipe], np.float32)
    owner = np.repeat(np.arange(len(recipes)), [len(recipe) for recipe in recipes])
    pages = slot_pages[slots]
    term, ordinal = np.nonzero(pages >= 0)
    table = np.empty((len(term), ENTRY_INTS), np.int32)
    table[:, 0] = pages[term, ordinal]
    table[:, 1] = slots[term]
    left = np.asarray(slot_ranks)[slots[term]] - ordinal * TILE_PAGE_RANK
    table[:, 2] = ordinal | np.clip(left, 0, TILE_PAGE_RANK) << 16
    table[:, 3] = weights.view(np.int32)[term]
    counts = np.bincount(owner[term], minlength=len(recipes))
    if counts.max(initial=0) > MAX_ENTRIES:
        widest = int(counts.argmax())
        raise ValueError(
            f"a recipe of {len(recipes[widest])} adapters has {counts[widest]} pages; a tile counts at most {MAX_ENTRIES}"
        )
    return table, counts


def _tiles(row_counts: Longs, entry_counts: Longs, table: Ints, tile_rows: int | Longs) -> tuple[Ints, Longs, Longs]:
    """[tiles, 8] int32 as they stand in the run, and rows and entries of each. tile_rows: at most, of all or each recipe's."""
    most = np.broadcast_to(tile_rows, row_counts.shape)
    tile_counts = -(-row_counts // most)
    owner = np.repeat(np.arange(len(row_counts)), tile_counts)
    inside = (np.arange(len(owner)) - np.repeat(before(tile_counts), tile_counts)) * most[owner]
    rows, entries = np.minimum(most[owner], row_counts[owner] - inside), entry_counts[owner]
    pairs = rows * entries
    tiles = np.zeros((len(owner), TILE_INTS), np.int32)
    tiles[:, 0] = before(row_counts)[owner] + inside
    tiles[:, 1] = rows | entries << 16
    tiles[:, 2] = before(entry_counts)[owner]
    tiles[:, 3] = before(pairs)
    has_entries = entries > 0
    tiles[has_entries, 4:] = table[tiles[has_entries, 2]]
    return tiles, rows, entries


def _items(tiles: Ints, per_tile: Longs, table: Ints) -> Ints:
    """[items, 8] int32: first place, rows | entries << 16, first pair, entry of the tile; then the entry itself."""
    items = np.empty((int(per_tile.sum()), ITEM_INTS), np.int32)
    items[:, :3] = np.repeat(tiles[:, [0, 1, 3]], per_tile, axis=0)
    items[:, 3] = np.arange(len(items)) - np.repeat(before(per_tile), per_tile)
    items[:, 4:] = table[np.repeat(tiles[:, 2], per_tile) + items[:, 3]]
    return items


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a run is made of.

    Attributes:
        streamed: What the stream deal counts: `tiles` themselves, or of long steps others, which the run holds too.
    """

    tiles: TileColumns
    streamed: TileColumns
    items: Ints
    table: Ints
    long: LongItems
    pair_count: int
    processors: int

    @property
    def has_own_streamed(self) -> bool:
        return self.streamed is not self.tiles

    def sections(self) -> list[Ints]:
        """Deals, items, tiles, rows, entries, tile_of, long items, streamed tiles."""
        tiles = self.tiles
        deals = [stream_deal(self.streamed, self.processors).ravel(), norm_deal(tiles, self.processors).ravel()]
        tile_of = np.repeat(np.arange(len(tiles.records), dtype=np.int32), tiles.rows)
        streamed = self.streamed.records if self.has_own_streamed else np.zeros(0, np.int32)
        return [np.concatenate(deals), self.items, tiles.records, tiles.places, self.table, tile_of, self.long.records, streamed]


def _join(parts: _Parts) -> Ints:
    """Header and sections in one run, each section at a multiple of 16 bytes."""
    tiles, sections = parts.tiles, parts.sections()
    offsets = np.cumsum([HEADER_INTS, *(aligned_ints(section.size) for section in sections)]).tolist()
    _, items_at, tiles_at, rows_at, entries_at, tile_of_at, long_at, streamed_at, end = offsets
    header = [len(tiles.records), len(parts.items), len(tiles.places), parts.pair_count]
    header += [tiles_at, rows_at, entries_at, items_at, int(tiles.rows.max(initial=0)), tile_of_at, parts.processors]
    header += [long_at if len(parts.long.records) else 0, parts.long.wide_count, parts.long.narrow_count]
    header += [streamed_at if parts.has_own_streamed else tiles_at, int(parts.streamed.rows.max(initial=0))]
    data = np.zeros(aligned_ints(end, LINE_INTS), np.int32)
    data[: len(header)] = header
    for offset, section in zip(offsets, sections, strict=False):
        data[offset : offset + section.size] = section.ravel()
    return data


def aligned_ints(ints: int, multiple: int = 4) -> int:
    """The next multiple: sections of a step's run of int32 begin at one, of 16 bytes where nothing else is said."""
    return -(-ints // multiple) * multiple
