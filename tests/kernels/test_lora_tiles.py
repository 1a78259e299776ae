"""Tiles of a step: every row once, order kept, nothing beyond the tile's own rounding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from node.kernels.lora_deal import deal_ints
from node.kernels.lora_tiles import HEADER_INTS, LINE_INTS, MAX_ENTRIES, block_ints, build_tiles, empty_tiles, same_ranks
from node.kernels.ops import Kernels
from node.kernels.reference_tiles import read_items, read_tile_of, read_tiles, reference_expand, reference_shrink

SLOTS, MOST_PAGES = 6, 4
ON = {"processors": 7, "slot_ranks": np.array([1, 0, 16, 40, 0, 64], np.int32)}


@st.composite
def slot_tables(draw):
    """Page lists of 1 to 4 pages, every page number once."""
    counts = draw(st.lists(st.integers(1, MOST_PAGES), min_size=SLOTS, max_size=SLOTS))
    numbers = iter(draw(st.permutations(range(sum(counts)))))
    table = np.full((SLOTS, MOST_PAGES), -1, np.int32)
    for slot, count in enumerate(counts):
        table[slot, :count] = [next(numbers) for _ in range(count)]
    return table


weights = st.floats(-2, 2, width=32).map(float)
recipes = st.lists(st.tuples(st.integers(0, SLOTS - 1), weights), max_size=3).map(tuple)
batches = st.lists(st.tuples(recipes, st.integers(0, 40)), max_size=12)
tile_sizes = st.sampled_from([1, 5, 16])


def _rows_of(batch):
    return [recipe for recipe, count in batch for _ in range(count)]


@given(batches, slot_tables(), tile_sizes)
def test_build_tiles_holds_every_row_once_with_its_recipe(batch, table, tile_rows):
    block = build_tiles([recipe for recipe, _ in batch], [count for _, count in batch], table, tile_rows, **ON)
    wanted = _rows_of(batch)
    seen = [row for tile in read_tiles(block.data) for row in tile.rows]
    assert sorted(seen) == list(range(len(wanted)))
    for tile in read_tiles(block.data):
        for row in tile.rows:
            pages = [
                (int(page), slot, p, np.float32(w)) for slot, w in wanted[row] for p, page in enumerate(table[slot]) if page >= 0
            ]
            assert tile.entries == pages


@given(batches, slot_tables(), tile_sizes)
def test_build_tiles_keeps_the_order_of_rows_and_fills_tiles(batch, table, tile_rows):
    block = build_tiles([recipe for recipe, _ in batch], [count for _, count in batch], table, tile_rows, **ON)
    rows_of = {}
    for row, recipe in enumerate(_rows_of(batch)):
        rows_of.setdefault(recipe, []).append(row)
    tiles = [tile.rows for tile in read_tiles(block.data)]
    assert tiles == [rows[i : i + tile_rows] for rows in rows_of.values() for i in range(0, len(rows), tile_rows)]


@given(batches, slot_tables(), tile_sizes)
def test_build_tiles_counts_items_and_pairs(batch, table, tile_rows):
    block = build_tiles([recipe for recipe, _ in batch], [count for _, count in batch], table, tile_rows, **ON)
    tiles = read_tiles(block.data)
    places = np.cumsum([0, *(len(tile.rows) for tile in tiles)])
    items = [(int(places[i]), e, entry) for i, tile in enumerate(tiles) for e, entry in enumerate(tile.entries)]
    assert read_items(block.data) == items
    assert read_tile_of(block.data) == [i for i, tile in enumerate(tiles) for _ in tile.rows]
    pairs = [tile.first_pair + i for tile in tiles for i in range(len(tile.rows) * len(tile.entries))]
    assert pairs == list(range(block.pair_count))
    assert block.tile_count == len(tiles)
    assert int(block.data[8]) == max((len(tile.rows) for tile in tiles), default=0)


@given(batches, slot_tables(), tile_sizes)
def test_build_tiles_needs_no_more_than_block_ints(batch, table, tile_rows):
    counts = [count for _, count in batch]
    block = build_tiles([recipe for recipe, _ in batch], counts, table, tile_rows, **ON)
    entries = max((sum(int((table[slot] >= 0).sum()) for slot, _ in recipe) for recipe, _ in batch), default=0)
    assert block.data.size <= block_ints(sum(counts), len(batch), entries, tile_rows, ON["processors"])
    assert all(offset % 4 == 0 for offset in block.data[4:8])


def test_build_tiles_without_adapters_has_rows_and_no_items():
    block = build_tiles([(), ()], [3, 20], np.zeros((0, 1), np.int32), 16, **ON)
    assert (block.tile_count, block.item_count, block.pair_count) == (2, 0, 0)


def test_build_tiles_too_many_pages_says_how_many():
    table = np.zeros((1, 1 << 15), np.int32)
    with pytest.raises(ValueError, match=f"at most {MAX_ENTRIES}"):
        build_tiles([((0, 1.0),)], [1], table, 16, **ON)


def test_reference_of_tiles_equals_sgmv(make_adapters):
    adapters = make_adapters([1, 8, 16, 24, 64], 48, (40, 24), torch.float32, page_rank=16)
    terms = [((0, 0.5),), ((1, 1.0), (4, -0.25)), (), ((3, 1.0),), ((1, 1.0), (4, -0.25)), ((2, 2.0),)]
    x = torch.randn(len(terms), 48, dtype=torch.float64)
    wanted = torch.zeros(len(terms), adapters.outputs, dtype=torch.float64)
    Kernels.load("reference").sgmv(wanted, x, adapters.pool, adapters.rows(terms), adapters.spans)
    block = build_tiles(terms, [1] * len(terms), adapters.pool.slot_pages.numpy(), 16, **ON).data
    spans = adapters.spans.table.tolist()
    v = reference_shrink(x, block, adapters.pool, spans)
    delta = reference_expand(v, block, adapters.pool, spans, len(terms), adapters.outputs)
    torch.testing.assert_close(delta, wanted, rtol=1e-12, atol=1e-12)


@given(batches, slot_tables(), tile_sizes)
def test_entries_say_how_many_ranks_every_module_has(batch, table, tile_rows):
    block = build_tiles([recipe for recipe, _ in batch], [count for _, count in batch], table, tile_rows, **ON)
    items = block.data[int(block.data[7]) :][: 8 * block.item_count].reshape(-1, 8)
    tiles = block.data[int(block.data[4]) :][: 8 * block.tile_count].reshape(-1, 8)
    shared = block.data[int(block.data[6]) :].reshape(-1, 4)
    of_tiles = [shared[int(tile[2]) + entry] for tile in tiles for entry in range(int(tile[1]) >> 16)]
    assert np.array_equal(np.array(of_tiles, np.int32).reshape(-1, 4), items[:, 4:])
    assert np.array_equal(tiles[tiles[:, 1] >> 16 > 0, 4:], items[items[:, 3] == 0, 4:])
    for _, slot, packed, _ in items[:, 4:].tolist():
        assert packed >> 16 == min(16, max(0, int(ON["slot_ranks"][slot]) - 16 * (packed & 0xFFFF)))


def test_same_ranks_of_a_table_are_those_of_slots_without_differences():
    table = np.array([[16, 8, 0, 4], [16, 8, 0, 5], [16, 8, 0, 4]], np.int32)
    assert same_ranks(table).tolist() == [16, 8, 0, 0]


def test_empty_tiles_count_nothing_and_hold_every_block_s_deal():
    block = empty_tiles(9)
    assert block[:4].tolist() == [0, 0, 0, 0]
    assert block[10] == 9
    assert len(block) >= HEADER_INTS + deal_ints(9)
    assert len(block) % LINE_INTS == 0
