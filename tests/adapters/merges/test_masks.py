from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.adapters.merges.masks import keep_mask

ADAPTER = "ab" * 32
NAME = "model.layers.0.self_attn.q_proj.lora_A.weight"


def test_keep_mask_golden():
    """The rule openlora.dare/1, as another implementation must reproduce it."""
    mask = keep_mask(ADAPTER, NAME, (4, 10), Decimal("0.5"))

    assert ["".join("#" if kept else "." for kept in row) for row in mask] == GOLDEN


GOLDEN = [
    "..#.##.#..",
    ".#.....#..",
    "#..#.##.#.",
    "##..##...#",
]


@given(st.decimals("0.01", "1", places=2), st.decimals("0.01", "1", places=2))
def test_keep_mask_more_density_keeps_a_superset(first, second):
    low, high = sorted((first, second))

    kept, more = (keep_mask(ADAPTER, NAME, (7, 31), density) for density in (low, high))

    assert not (kept & ~more).any()


@pytest.mark.parametrize("density", ["0.05", "0.5", "0.93"])
def test_keep_mask_keeps_about_its_density(density):
    mask = keep_mask(ADAPTER, NAME, (400, 500), Decimal(density))

    assert abs(mask.mean() - float(density)) < 0.005


def test_keep_mask_depends_on_adapter_and_tensor_only():
    half = Decimal("0.5")
    first = keep_mask(ADAPTER, NAME, (20, 20), half)

    assert np.array_equal(first, keep_mask(ADAPTER, NAME, (20, 20), half))
    assert not np.array_equal(first, keep_mask("cd" * 32, NAME, (20, 20), half))
    assert not np.array_equal(first, keep_mask(ADAPTER, NAME.replace("lora_A", "lora_B"), (20, 20), half))


def test_keep_mask_density_one_keeps_everything():
    assert keep_mask(ADAPTER, NAME, (9, 9), Decimal(1)).all()
