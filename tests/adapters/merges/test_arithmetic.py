import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from node.adapters.merges.arithmetic import elected_mean, factor_weights, padded, prune_smallest, weighted_sum

FLOATS = st.floats(-8, 8, width=32)
PAIRS = st.integers(1, 4).flatmap(
    lambda count: st.lists(arrays(np.float32, (3, 4), elements=FLOATS), min_size=count, max_size=count)
)


@given(arrays(np.float32, (5, 7), elements=FLOATS), st.floats(0.01, 1))
def test_prune_smallest_keeps_the_largest_and_their_number(tensor, density):
    kept = prune_smallest(tensor, density)

    count = int(density * tensor.size)
    changed = kept != tensor
    assert np.count_nonzero(kept) <= count
    assert np.count_nonzero(changed) <= tensor.size - count
    if changed.any() and count:
        assert np.abs(tensor[changed]).max() <= np.sort(np.abs(tensor).ravel())[-count]


def test_prune_smallest_equal_magnitudes_keep_the_first_in_order():
    tensor = np.array([[1, -2, 2], [-2, 2, 3]], dtype=np.float32)

    assert prune_smallest(tensor, 0.5).tolist() == [[0, -2, 2], [0, 0, 3]]


def test_prune_smallest_counts_in_double_precision_as_peft_does():
    tensor = np.arange(1, 101, dtype=np.float32).reshape(10, 10)

    assert np.count_nonzero(prune_smallest(tensor, 0.29)) == 28


@pytest.mark.parametrize(("weight", "scale", "signs"), [(0.25, 4.0, (1, 1)), (-0.25, 4.0, (-1, 1)), (0.0, 2.0, (1, 1))])
def test_factor_weights_multiply_to_weight_times_scale(weight, scale, signs):
    a, b = factor_weights(weight, scale)

    assert a * b == weight * scale
    assert (math.copysign(1, a), math.copysign(1, b)) == signs


@given(PAIRS)
def test_elected_mean_of_agreeing_tensors_is_the_mean(tensors):
    tensors = [np.abs(tensor) + np.float32(1) for tensor in tensors]
    ones = [np.float32(1)] * len(tensors)

    assert np.allclose(elected_mean(tensors, ones, "total"), np.mean(tensors, axis=0), rtol=1e-5)
    assert np.array_equal(elected_mean(tensors, ones, "frequency"), elected_mean(tensors, ones, "total"))


def test_elected_mean_methods_differ_where_few_outweigh_many():
    tensors = [np.array([[value]], dtype=np.float32) for value in (-1, -1, 9)]
    ones = [np.float32(1)] * 3

    assert elected_mean(tensors, ones, "total").item() == 9
    assert elected_mean(tensors, ones, "frequency").item() == -1


@given(PAIRS)
def test_weighted_sum_is_linear(tensors):
    halves = [np.float32(0.5)] * len(tensors)

    assert np.allclose(2 * weighted_sum(tensors, halves), weighted_sum(tensors, [np.float32(1)] * len(tensors)), atol=1e-5)


def test_padded_keeps_values_in_the_corner():
    result = padded(np.ones((2, 3), dtype=np.float32), (4, 3))

    assert result.sum() == 6
    assert result[2:].sum() == 0
