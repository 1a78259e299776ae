"""The deal of a step's tiles, read as `csrc/cuda/device.cuh` reads it: everything once, in order, in fair shares."""

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from node.kernels.lora_deal import MOST_WEIGHED, WEIGHT_STEPS, deal_ints
from node.kernels.lora_tiles import HEADER_INTS, ITEM_INTS, LINE_INTS, build_tiles, empty_tiles
from node.kernels.reference_tiles import read_tiles

SLOTS = 5
TABLE = np.arange(SLOTS * 3, dtype=np.int32).reshape(SLOTS, 3)
TABLE[0, 1:] = TABLE[1, 2:] = -1
RANKS = np.array([16, 20, 48, 0, 33], np.int32)
recipes = st.lists(st.integers(0, SLOTS - 1).map(lambda slot: (slot, 1.0)), max_size=3).map(tuple)
batches = st.lists(st.tuples(recipes, st.integers(1, 70)), min_size=1, max_size=20)
processor_counts = st.sampled_from([1, 2, 7, 46, 132])
group_counts = st.sampled_from([1, 3, 24, 48, 112, 224])


def build(batch, processors):
    recipes, counts = zip(*batch, strict=True)
    return build_tiles(recipes, counts, TABLE, 16, processors=processors, slot_ranks=RANKS).data


@dataclass
class StreamShare:
    """As `as_stream_share` finds it."""

    begin: tuple[int, int]
    end: tuple[int, int]
    dealt: int
    first_pair: int
    pairs: int
    records: list[list[int]]


def group_of(place, weight, groups):
    return -(-place * groups // max(weight, 1))


def stream_share(block, b, groups):
    line = [int(value) for value in block[HEADER_INTS + 32 * b :][:32]]
    begin, end = (line[0], group_of(line[1], line[2], groups)), (line[3], group_of(line[4], line[5], groups))
    begin, end = ((tile + 1, 0) if group == groups else (tile, group) for tile, group in (begin, end))
    return StreamShare(begin, end, line[0], line[6], line[7], [line[8 * i : 8 * i + 8] for i in range(1, 4)])


def norm_share(block, b):
    processors = int(block[10])
    return [int(value) for value in block[HEADER_INTS + 32 * processors + 16 * b :][:16]]


def record(block, tile, offset=4):
    return block[int(block[offset]) + 8 * tile :][:8].tolist()


def streamed(block):
    """Rows, entries, first pair of each tile that the stream deal numbers."""
    count = int(block[HEADER_INTS + 32 * (int(block[10]) - 1) + 3])
    records = [record(block, tile, 14) for tile in range(count)]
    return [(packed & 0xFFFF, packed >> 16, first_pair) for _, packed, _, first_pair, *_ in records]


@given(batches, processor_counts, group_counts)
def test_stream_deal_covers_every_group_of_every_tile_once_in_order(batch, processors, groups):
    block = build(batch, processors)
    at = (0, 0)
    for b in range(processors):
        share = stream_share(block, b, groups)
        assert share.begin == at
        assert share.end >= at
        at = share.end
    assert at == (len(streamed(block)), 0)


@given(batches, processor_counts)
def test_streamed_tiles_are_the_tiles_and_in_long_steps_equal_parts_of_a_recipe(batch, processors):
    block = build(batch, processors)
    tiles, by_recipe = streamed(block), {}
    for recipe, count in batch:
        by_recipe[recipe] = by_recipe.get(recipe, 0) + count
    if int(block[2]) < 32 * processors:
        assert tiles == [(len(tile.rows), len(tile.entries), tile.first_pair) for tile in read_tiles(block)]
        return
    assert block[15] == max(rows for rows, _, _ in tiles) <= 64
    for count in by_recipe.values():
        parts = [rows for rows, _, _ in tiles[: -(-count // parts_of(count))]]
        assert sum(parts) == count
        assert set(parts[:-1]) <= {parts_of(count)}
        tiles = tiles[len(parts) :]
    assert not tiles


def parts_of(count):
    """Rows of a long tile: multiples of 8, as many tiles as of 64 rows."""
    return next(size for size in range(8, 72, 8) if -(-count // size) <= -(-count // 64))


@given(batches, processor_counts)
def test_stream_deal_gives_equal_weights(batch, processors):
    block = build(batch, processors)
    lines = block[HEADER_INTS:][: 32 * processors].reshape(processors, 32)
    weights = [WEIGHT_STEPS * (8 * min(entries, MOST_WEIGHED) + rows + 2) for rows, entries, _ in streamed(block)]
    starts = np.cumsum([0, *weights])
    shares = [int(starts[line[3]] + line[4] - starts[line[0]] - line[1]) for line in lines]
    assert sum(shares) == sum(weights)
    assert max(shares) - min(shares) <= 1
    assert lines[0, :2].tolist() == [0, 0]
    assert (lines[1:, :3] == lines[:-1, 3:6]).all()
    assert all(line[2] == weights[line[0]] for line in lines if line[0] < len(weights))


@given(batches, processor_counts, group_counts)
def test_stream_deal_holds_the_records_and_pairs_of_what_a_block_meets(batch, processors, groups):
    block = build(batch, processors)
    tiles = streamed(block)
    for b in range(processors):
        share = stream_share(block, b, groups)
        if share.begin == share.end:
            continue
        last = share.end[0] - (share.end[1] == 0)
        assert share.dealt in (share.begin[0], share.begin[0] - 1)
        rows, entries, first_pair = tiles[last]
        assert share.first_pair == tiles[share.dealt][2]
        assert share.first_pair + share.pairs >= first_pair + rows * entries
        for tile in range(share.begin[0], min(last, share.dealt + 2) + 1):
            assert share.records[tile - share.dealt] == record(block, tile, 14)


@given(batches, processor_counts)
def test_norm_deal_covers_every_row_once_in_units_of_its_size(batch, processors):
    block = build(batch, processors)
    tiles, rows = read_tiles(block), int(block[2])
    shares = [norm_share(block, b) for b in range(processors)]
    units = {size: sum(-(-len(tile.rows) // size) for tile in tiles) for size in (1, 2, 3)}
    wanted = next((size for size in (1, 2) if units[size] <= processors), 3)
    assert {share[2] for share in shares} == {wanted}
    counts = [share[3] for share in shares]
    assert sum(counts) == units[wanted]
    assert max(counts) - min(counts) <= 1
    seen = []
    for share in shares:
        seen += rows_of_norm_share(block, tiles, share)
    assert seen == [row for tile in tiles for row in tile.rows]
    assert len(seen) == rows


def rows_of_norm_share(block, tiles, share):
    """Rows of a block's units, in its order; checks what it was told of the first one."""
    index, first, size, units = share[:4]
    seen = []
    for unit in range(units):
        rows = tiles[index].rows[first : first + size]
        if unit == 0:
            assert share[4:12] == record(block, index)
            assert share[12:15] == rows + [-1] * (3 - len(rows))
        seen += rows
        first += size
        if first >= len(tiles[index].rows):
            index, first = index + 1, 0
    return seen


@given(batches, processor_counts)
def test_items_stand_behind_the_deals_and_the_run_ends_at_a_line(batch, processors):
    block = build(batch, processors)
    assert block[7] == HEADER_INTS + deal_ints(processors)
    assert len(block) >= block[7] + ITEM_INTS * block[1]
    assert len(block) % LINE_INTS == 0


def test_no_tiles_give_no_block_anything():
    block = empty_tiles(6)
    for b in range(6):
        share = stream_share(block, b, 48)
        assert share.begin == share.end == (0, 0)
        assert share.pairs == 0
        assert norm_share(block, b)[3] == 0


def test_tiles_of_a_recorded_step_s_blank_memory_give_no_block_anything():
    share = stream_share(np.zeros(HEADER_INTS + deal_ints(2), np.int32), 1, 48)
    assert share.begin == share.end
