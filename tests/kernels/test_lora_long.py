"""Long items of a step, read as `csrc/cuda/lora_wide.cuh` reads them: every pair of the tiles once, as rows of one recipe."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from node.kernels.lora_long import LONG_STEP_ROWS, NARROW_ROWS, WIDE_ROWS
from node.kernels.lora_tiles import block_ints, build_tiles
from node.kernels.reference_tiles import read_tiles

SLOTS = 5
TABLE = np.arange(SLOTS * 3, dtype=np.int32).reshape(SLOTS, 3)
TABLE[0, 1:] = TABLE[1, 2:] = -1
RANKS = np.array([16, 20, 48, 0, 33], np.int32)
recipes = st.lists(st.integers(0, SLOTS - 1).map(lambda slot: (slot, 1.0)), max_size=3).map(tuple)
prompts = st.tuples(recipes, st.integers(1, 700))
long_batches = st.lists(prompts, min_size=2, max_size=12).map(lambda batch: [*batch, ((), LONG_STEP_ROWS)])


def build(batch, processors=132):
    recipes, counts = zip(*batch, strict=True)
    return build_tiles(recipes, counts, TABLE, 16, processors=processors, slot_ranks=RANKS)


def long_section(block):
    offset, wide, narrow = (int(value) for value in block[11:14])
    return block[offset:][: 8 * (wide + narrow)].reshape(-1, 8), wide


def pairs_of_tiles(block):
    """(place, entry, page) -> pair."""
    found, place = {}, 0
    for tile in read_tiles(block):
        for i in range(len(tile.rows)):
            for e, entry in enumerate(tile.entries):
                found[place + i, e, entry[0]] = tile.first_pair + i * len(tile.entries) + e
        place += len(tile.rows)
    return found


@settings(deadline=None, max_examples=40)
@given(long_batches, st.sampled_from([7, 46, 132]))
def test_long_items_hold_every_pair_of_the_tiles_once(batch, processors):
    data = build(batch, processors).data
    records, _ = long_section(data)
    found = {}
    for place, packed, first_pair, entry, page, *_ in records.tolist():
        for i in range(packed & 0xFFFF):
            assert (place + i, entry, page) not in found
            found[place + i, entry, page] = first_pair + i * (packed >> 16) + entry
    assert found == pairs_of_tiles(data)


@settings(deadline=None, max_examples=40)
@given(long_batches)
def test_long_items_stand_wide_ones_first_and_repeat_the_entries_of_items(batch):
    block = build(batch)
    records, wide = long_section(block.data)
    sizes = (records[:, 1] & 0xFFFF).tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert all(NARROW_ROWS < size <= max(WIDE_ROWS) for size in sizes[:wide])
    assert all(0 < size <= NARROW_ROWS for size in sizes[wide:])
    items = block.data[int(block.data[7]) :][: 8 * block.item_count].reshape(-1, 8)
    assert {tuple(item) for item in items[:, 3:].tolist()} == {tuple(item) for item in records[:, 3:].tolist()}
    assert block.data[11] % 4 == 0


@settings(deadline=None, max_examples=40)
@given(long_batches)
def test_block_ints_has_room_for_long_items(batch):
    block = build(batch)
    assert block.data.size <= block_ints(sum(count for _, count in batch), len(batch), 9, 16, 132)


def test_a_step_of_prompts_is_cut_so_that_all_processors_have_one_item():
    full = build([(((0, 1.0 + i),), 256) for i in range(32)])
    records, wide = long_section(full.data)
    assert {int(size) for size in records[:wide, 1] & 0xFFFF} == {64}
    half = build([(((0, 1.0),), 3000), (((1, 1.0),), 1096)])
    _, wide = long_section(half.data)
    assert 100 < wide <= 132


def test_rows_that_decode_with_a_prompt_s_adapter_make_no_item_of_their_own():
    mixed = build([(((0, 1.0 + i),), 256) for i in range(32)] + [(((0, 1.0 + i % 40),), 1) for i in range(120)])
    records, wide = long_section(mixed.data)
    assert {int(size) for size in records[:wide, 1] & 0xFFFF} == {64, 65}
    assert len(records) - wide == 8


def test_a_short_step_and_one_without_adapters_have_no_long_items():
    assert build([(((0, 1.0),), LONG_STEP_ROWS)]).data[11:14].tolist() == [0, 0, 0]
    assert build([((), 3 * LONG_STEP_ROWS)]).data[11:14].tolist() == [0, 0, 0]
