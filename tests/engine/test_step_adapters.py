"""Tiles of a GPU's step."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from node.engine.graphs import Adapted
from node.engine.messages import Submit
from node.engine.sequence import Sequence
from node.engine.sizing import DeviceSizes
from node.engine.step_adapters import TILE_ROWS, StepAdapters, adapted_of, most_tile_ints
from node.engine.step_plan import Work
from node.kernels.lora_tiles import build_tiles
from node.request import AdapterTerm, Sampling

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


class Slots:
    """Adapters named by their slots; those of slot 2 change the output projection."""

    tensors = SimpleNamespace(slot_pages=torch.from_numpy(SLOT_PAGES))
    layer_ranks = np.array([16, 32, 16], np.int32)

    def slot_of(self, adapter_id):
        return int(adapter_id)

    def adapts(self, adapter_id, module):
        return adapter_id == "2"


def work(prompt, start, count, *adapters, **sampling):
    terms = tuple(AdapterTerm(name, "/", 1.0) for name in adapters)
    submit = Submit(
        sequence_id="s", tenant="t", prompt_ids=(7,) * prompt, terms=terms, sampling=Sampling(max_new_tokens=1, **sampling)
    )
    return Work.of(Sequence(submit, 0, b""), start, count)


def decode(*adapters):
    return work(5, 4, 1, *adapters)


@pytest.mark.parametrize(
    ("step", "drawing"),
    [
        ([decode("1"), work(90, 0, 40, "0"), decode(), decode("2", "1")], [decode("1"), decode(), decode("2", "1")]),
        ([decode("1"), work(40, 0, 40, "0"), work(90, 3, 8, "2")], [decode("1"), decode("0")]),
    ],
    ids=["a chunk that goes on", "one that ends"],
)
def test_wanted_rows_have_the_tiles_of_a_decode_step(step, drawing):
    adapters = StepAdapters(Slots(), head_module=0, processors=13)
    found, expected = adapters.row_tiles(step), adapters.members(drawing, ())
    assert found.wanted.data.tolist() == expected.tiles.data.tolist()
    assert found.wanted_count == len(drawing)
    assert found.has_head == (expected.adapted is Adapted.LAYERS_AND_HEAD)
    assert found.size == len(found.rows.data) + len(found.wanted.data)


def test_wanted_rows_without_adapters_have_no_tiles():
    found = StepAdapters(Slots(), head_module=0, processors=13).row_tiles([decode(), work(90, 0, 40, "2")])
    assert (found.wanted, found.wanted_count, found.has_head) == (None, 1, False)


def test_rows_that_are_all_wanted_have_one_block():
    step = [decode("2"), work(40, 0, 30, "0", prompt_logprobs=True)]
    found = StepAdapters(Slots(), head_module=0, processors=13).row_tiles(step)
    assert (found.wanted, found.wanted_count, found.has_head) == (None, 31, True)
