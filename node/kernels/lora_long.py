"""The items of a step with long prompts: as many neighbouring rows of a recipe as a processor can take at a time.

A shrink reads the page of an item once and the rows of x once, so items of many rows move fewer bytes; too many rows leave
processors without an item. `csrc/cuda/lora_wide.cuh` computes them.

Shape letters: P the GPU's processors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from node.kernels.lora_deal import Ints, Longs, before

LONG_STEP_ROWS = 2048  # a step of more rows has long items, and a kernel that reads them
WIDE_ROWS = (72, 64, 56, 48, 40, 32, 24)  # that a wide item may have: 8 a warp
NARROW_ROWS = 16  # of a narrow item at most
PAGE_ROWS = 40  # rows of x that take as long as what every wide item costs: its pages, its start


@dataclass(frozen=True, slots=True)
class RecipeRows:
    """The rows of a step, recipe by recipe.

    Attributes:
        counts: [recipes]. Rows of each, at neighbouring places. entry_counts: [recipes]. Pages of each.
        table: [entries, 4] int32. Those of all recipes, one recipe behind the other.
    """

    counts: Longs
    entry_counts: Longs
    table: Ints


@dataclass(frozen=True, slots=True)
class LongItems:
    """`records`: [wide_count + narrow_count, 8] int32, as items of a tile stand in the run; wide ones first, most rows first."""

    records: Ints
    wide_count: int
    narrow_count: int


def long_items(rows: RecipeRows, processors: int) -> LongItems:
    """Cut a step into items of up to 72 rows; none where it is not long."""
    if int(rows.counts.sum()) <= LONG_STEP_ROWS:
        return LongItems(np.zeros((0, 8), np.int32), 0, 0)
    records = _records(rows, _chosen_rows(rows, processors))
    sizes = records[:, 1] & 0xFFFF
    wide_count = int((sizes > NARROW_ROWS).sum())
    return LongItems(records[np.argsort(-sizes, kind="stable")], wide_count, len(records) - wide_count)


def _chosen_rows(rows: RecipeRows, processors: int) -> int:
    """Of a wide item: what ends first when every processor takes one at a time."""

    wide = rows.counts > NARROW_ROWS
    counts, entry_counts = rows.counts[wide], rows.entry_counts[wide]

    def end(size: int) -> int:
        pieces = -(-counts // size)
        rounds = -(-int((pieces * entry_counts).sum()) // processors)
        return rounds * (int((-(-counts // pieces)).max(initial=0)) + PAGE_ROWS)

    return min(WIDE_ROWS, key=end)


def _records(rows: RecipeRows, size: int) -> Ints:
    """[items, 8] int32, a recipe's in the order of its rows, those of the same rows in the order of its entries.

    A recipe's rows are cut evenly: a few left over would cost its pages once more.
    """
    pieces = -(-rows.counts // size)
    owner = np.repeat(np.arange(len(pieces)), pieces)
    number, count = np.arange(len(owner)) - np.repeat(before(pieces), pieces), rows.counts[owner]
    inside, end = number * count // pieces[owner], (number + 1) * count // pieces[owner]
    per_piece = rows.entry_counts[owner]
    piece = np.repeat(np.arange(len(owner)), per_piece)
    entry = np.arange(len(piece)) - np.repeat(before(per_piece), per_piece)
    owner, inside, size_of = owner[piece], inside[piece], (end - inside)[piece]
    entries = rows.entry_counts[owner]
    records = np.empty((len(piece), 8), np.int32)
    records[:, 0] = before(rows.counts)[owner] + inside
    records[:, 1] = size_of | entries << 16
    records[:, 2] = before(rows.counts * rows.entry_counts)[owner] + inside * entries
    records[:, 3] = entry
    records[:, 4:] = rows.table[before(rows.entry_counts)[owner] + entry]
    return records
