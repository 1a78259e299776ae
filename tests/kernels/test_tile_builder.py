"""The compiled builder against numpy's, int for int."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.kernels.build import build
from node.kernels.lora_tiles import MAX_ENTRIES, build_tiles
from node.kernels.tile_builder import TileBuilder

SLOTS, MOST_PAGES = 12, 5


@pytest.fixture(scope="module")
def library():
    return build()


def pages_of(counts):
    """[S, pages]: so many of each slot, all different."""
    pages = np.full((len(counts), MOST_PAGES), -1, np.int32)
    for slot, count in enumerate(counts):
        pages[slot, :count] = 100 * slot + np.arange(count)
    return pages


def assert_same(builder, tile_rows, processors, recipes, counts, pages, ranks):
    expected = build_tiles(recipes, counts, pages, tile_rows, processors=processors, slot_ranks=ranks)
    found = builder.build(recipes, counts, pages, ranks)
    assert np.array_equal(found.data, expected.data)
    assert found.data.dtype == np.int32
    for name in ("tile_count", "item_count", "pair_count"):
        assert getattr(found, name) == getattr(expected, name)


TERM = st.tuples(st.integers(0, SLOTS - 1), st.sampled_from([1.0, 0.5, -2.0, 0.1]))
SEQUENCE = st.tuples(st.lists(TERM, max_size=3).map(tuple), st.sampled_from([0, 1, 1, 1, 1, 2, 5, 16, 17, 40]))


@settings(max_examples=300, deadline=None)
@given(
    sequences=st.lists(SEQUENCE, min_size=1, max_size=40),
    page_counts=st.lists(st.integers(0, MOST_PAGES), min_size=SLOTS, max_size=SLOTS),
    ranks=st.lists(st.sampled_from([0, 1, 8, 16, 20, 64]), min_size=SLOTS, max_size=SLOTS),
    processors=st.sampled_from([1, 7, 132]),
    tile_rows=st.sampled_from([1, 3, 16]),
)
def test_short_steps_have_numpys_run(library, sequences, page_counts, ranks, processors, tile_rows):
    recipes, counts = [recipe for recipe, _ in sequences], [count for _, count in sequences]
    builder = TileBuilder(tile_rows, processors, library)
    assert_same(builder, tile_rows, processors, recipes, counts, pages_of(page_counts), np.array(ranks, np.int32))


@pytest.mark.parametrize(
    ("sequences", "adapters", "prompt"), [(256, 64, 1), (63, 8, 16), (32, 32, 128), (31, 31, 481), (4, 2, 600), (1, 1, 3000)]
)
def test_steps_of_an_engine_have_numpys_run(library, sequences, adapters, prompt):
    pages, ranks = pages_of([1] * adapters), np.full(adapters, 16, np.int32)
    recipes = [((index % adapters, 1.0),) for index in range(sequences)]
    assert_same(TileBuilder(16, 132, library), 16, 132, recipes, [1] * (sequences - 1) + [prompt], pages, ranks)


def test_run_that_does_not_fit_is_numpys(library, monkeypatch):
    monkeypatch.setattr("node.kernels.tile_builder.SCRATCH_INTS", 7000)
    pages, ranks = pages_of([1] * 64), np.full(64, 16, np.int32)
    recipes = [((index, 1.0),) for index in range(64)]
    builder = TileBuilder(16, 132, library)
    assert builder._build_short(recipes, [1] * 64, pages, ranks) is None
    assert_same(builder, 16, 132, recipes, [1] * 64, pages, ranks)


def test_without_the_library_everything_is_numpys():
    recipes, pages, ranks = [((0, 1.0),)], pages_of([1]), np.array([16], np.int32)
    assert_same(TileBuilder(16, 132, None), 16, 132, recipes, [3], pages, ranks)


def test_recipe_of_too_many_pages_is_refused_as_before(library):
    pages = np.zeros((1, MAX_ENTRIES + 1), np.int32)
    with pytest.raises(ValueError, match="pages"):
        TileBuilder(16, 4, library).build([((0, 1.0),)], [1], pages, np.array([16], np.int32))


def test_slot_that_is_none_is_never_followed(library):
    builder = TileBuilder(16, 4, library)
    for slot in (3, -1):
        assert builder._build_short([((slot, 1.0),)], [1], pages_of([1, 1, 1]), np.zeros(3, np.int32)) is None
