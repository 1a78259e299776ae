"""Ranks that all modules of a slot's adapter share."""

from types import SimpleNamespace

import numpy as np
import pytest

from node.adapters.slot_ranks import SlotRanks
from node.kernels.layout import PageLayout

LAYOUT = PageLayout([("model.layers.0.q", 4, 4), ("model.layers.0.k", 4, 4), ("lm_head", 4, 9)], 16)


def file_of(ranks):
    touched = [index for index, rank in enumerate(ranks) if rank]
    return SimpleNamespace(module_indices=np.array(touched), ranks=np.array([ranks[index] for index in touched], np.int32))


@pytest.mark.parametrize(
    ("ranks", "found"),
    [((16, 16, 0), 16), ((16, 16, 8), 16), ((16, 8, 0), 0), ((16, 0, 16), 0), ((0, 0, 4), 0), ((20, 20, 20), 20)],
)
def test_slot_ranks_are_those_of_all_layers_or_none(ranks, found):
    slots = SlotRanks(LAYOUT, 3)
    slots.set(1, file_of(ranks))
    assert slots.values.tolist() == [0, found, 0]


def test_slot_ranks_of_a_slot_taken_again_are_the_new_adapter_s():
    slots = SlotRanks(LAYOUT, 2)
    slots.set(0, file_of((16, 16, 0)))
    slots.clear(0)
    assert slots.values.tolist() == [0, 0]
    slots.set(0, file_of((8, 4, 0)))
    assert slots.values.tolist() == [0, 0]
