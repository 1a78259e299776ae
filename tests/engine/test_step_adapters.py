"""Tiles of a GPU's step."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from node.engine.graphs import Adapted
from node.engine.sizing import DeviceSizes
from node.engine.step_adapters import TILE_ROWS, adapted_of, most_tile_ints
from node.kernels.lora_tiles import build_tiles

SIZES = DeviceSizes(4, 200, 512, 100, head_module=0, processors=13)
SLOT_PAGES = np.array([[0, -1], [1, 2], [3, -1]], np.int32)


@given(st.lists(st.tuples(st.integers(0, 50), st.sampled_from([(), (0,), (1,), (2, 1)])), min_size=1, max_size=4))
def test_room_for_tiles_is_enough_for_every_step(asks):
    counts = [count for count, _ in asks]
    recipes = [[(slot, 1.0) for slot in slots] for _, slots in asks]
    tiles = build_tiles(recipes, counts, SLOT_PAGES, TILE_ROWS, processors=13, slot_ranks=np.array([16, 32, 0], np.int32))
    assert len(tiles.data) <= most_tile_ints(SIZES, 4, entries=3)


def test_short_steps_with_many_pages_are_steps_of_their_own():
    pages, ranks = np.arange(128, dtype=np.int32)[:, None], np.full(128, 16, np.int32)
    few, many = (
        build_tiles([[(slot, 1.0)] for slot in range(count)], [1] * count, pages, 16, processors=13, slot_ranks=ranks)
        for count in (8, 64)
    )
    assert [adapted_of(rows, few) for rows in (8, 256)] == [Adapted.LAYERS, Adapted.LAYERS]
    assert [adapted_of(rows, many) for rows in (64, 256)] == [Adapted.MANY_LAYERS, Adapted.LAYERS]
