"""Which block of a CUDA kernel computes what of a step's tiles: made once by the host, read by a block with one load of a line.

Otherwise every block of eight kernels a layer finds its share by itself: a chain of four or five loads that wait for each other
before it can send for the first byte of an adapter. `csrc/cuda/lora_work.h` describes the layout, `csrc/cuda/device.cuh` reads
it.

Shape letters: P blocks (the GPU's processors), T rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

STREAM_INTS, NORM_INTS = 32, 16  # of a block
STREAM_TILES = 3  # records in a block's share
WEIGHT_STEPS = 128  # of a tile's weight: shares must be finer than its groups, of which there are up to a hundred
NORM_ROWS = 3  # of a unit at most
MOST_WEIGHED = 16  # entries; beyond, a tile is as heavy
WIDE_ROWS = 64  # at most, of what a kernel that streams B takes as one tile in long steps
PASS_ROWS = 8  # that it finishes together
WIDE_SHARE = 32  # rows a block from which a step is long


@dataclass(frozen=True, slots=True)
class TileColumns:
    """What the deals read of the tiles.

    Attributes:
        records: [tiles, 8] int32 as they stand in the block. rows, entries: [tiles], of each.
        places: [T] int32. Row of x and y at each place.
    """

    records: Ints
    rows: Longs
    entries: Longs
    places: Ints


def deal_ints(processors: int) -> int:
    """int32 of both deals together."""
    return processors * (STREAM_INTS + NORM_INTS)


def is_long(rows: int, processors: int) -> bool:
    """Whether the stream deal counts long tiles: neighbouring tiles of a recipe have B sent for once."""
    return rows >= WIDE_SHARE * processors


def wide_rows(counts: Longs) -> Longs:
    """[recipes]: rows of a long tile of each, equal parts in passes of 8 rows, so that few rows are left for its last one."""
    parts = np.maximum(1, -(-counts // WIDE_ROWS))
    rows: Longs = -(-counts // (parts * PASS_ROWS)) * PASS_ROWS
    return rows


def tile_weights(rows: Longs, entries: Longs) -> Longs:
    """How long a streaming kernel is at work on a tile: B's bytes, rows, what every tile costs."""
    return WEIGHT_STEPS * (8 * np.minimum(entries, MOST_WEIGHED) + rows + 2)


def stream_deal(tiles: TileColumns, processors: int) -> Ints:
    """[P, 32] int32: equal shares of all tiles' weights, one run of neighbouring (tile, group) a block."""
    weights = tile_weights(tiles.rows, tiles.entries)
    starts = _starts(weights)
    bounds = np.arange(processors + 1, dtype=np.int64) * starts[-1] // processors
    tile = np.searchsorted(starts[1:], bounds, side="right")
    place = bounds - starts[tile]
    weight = np.append(weights, 1)[tile]
    deal = np.zeros((processors, STREAM_INTS), np.int32)
    deal[:, 0], deal[:, 1], deal[:, 2] = tile[:-1], place[:-1], weight[:-1]
    deal[:, 3], deal[:, 4], deal[:, 5] = tile[1:], place[1:], weight[1:]
    behind = np.where(bounds[1:] > bounds[:-1], tile[1:] + (place[1:] > 0), tile[:-1])  # the last tile it meets, plus one
    pairs = _starts(tiles.rows * tiles.entries)
    deal[:, 6] = pairs[tile[:-1]]
    deal[:, 7] = pairs[behind] - pairs[tile[:-1]]
    index = tile[:-1, None] + np.arange(STREAM_TILES)
    is_met = index < behind[:, None]
    deal[:, 8:].reshape(processors, STREAM_TILES, 8)[is_met] = tiles.records[index[is_met]]
    return deal


def norm_deal(tiles: TileColumns, processors: int) -> Ints:
    """[P, 16] int32: a run of neighbouring units a block, a unit being up to three rows of one tile.

    As few rows a unit as make no more units than blocks; where even the most make more, runs of several.
    """
    deal = np.zeros((processors, NORM_INTS), np.int32)
    deal[:, 12:15] = -1
    deal[:, 2] = size = _unit_rows(tiles, processors)
    starts = _starts(-(-tiles.rows // size))
    total = int(starts[-1])
    first = np.arange(processors + 1, dtype=np.int64)
    first = np.minimum(first, total) if total <= processors else total * first // processors
    has = first[1:] > first[:-1]
    unit = first[:-1][has]
    tile = np.searchsorted(starts[1:], unit, side="right")
    place = (unit - starts[tile]) * size
    deal[has, 0], deal[has, 1], deal[:, 3] = tile, place, first[1:] - first[:-1]
    deal[has, 4:12] = tiles.records[tile]
    offset = np.arange(size)
    rows = tiles.places[np.minimum((tiles.records[tile, 0] + place)[:, None] + offset, len(tiles.places) - 1)]
    deal[has, 12 : 12 + size] = np.where(place[:, None] + offset < tiles.rows[tile, None], rows, -1)
    return deal


def _unit_rows(tiles: TileColumns, processors: int) -> int:
    for size in range(1, NORM_ROWS):
        if int((-(-tiles.rows // size)).sum()) <= processors:
            return size
    return NORM_ROWS


def before(sizes: Longs) -> Longs:
    """[n]: of each the sum of those before it."""
    return np.cumsum(sizes) - sizes


def _starts(sizes: Longs) -> Longs:
    """[n + 1]: the sum of what comes before each, and of all."""
    starts = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts
