"""The arithmetic of merging one tensor of several adapters, in float32, the same bits everywhere.

Every operation is element by element and every sum runs over the adapters in the order of the recipe: no library of matrix
products decides an order of its own. Formulas are PEFT's (`peft.utils.merge_utils`, 0.21).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def factor_weights(weight: float, scale: float) -> tuple[np.float32, np.float32]:
    """What A and B of an adapter are multiplied with: the root of |weight * scale|, the sign on A alone."""
    root = math.sqrt(abs(weight * scale))
    return np.float32(root if weight * scale >= 0 else -root), np.float32(root)


def prune_smallest(tensor: Floats, density: float) -> Floats:
    """Keep the int(density * size) elements of largest magnitude; of equal ones the first in row-major order.

    The count is computed in double precision, as PEFT does: for 100 elements a density of 0.29 keeps 28.
    """
    count = int(density * tensor.size)
    if density >= 1 or count >= tensor.size:
        return tensor
    if count == 0:
        return np.zeros_like(tensor)
    magnitudes = np.abs(tensor).ravel()
    bound = np.partition(magnitudes, tensor.size - count)[tensor.size - count]
    kept = magnitudes > bound
    equal = np.flatnonzero(magnitudes == bound)[: count - int(kept.sum())]
    kept[equal] = True
    return np.where(kept.reshape(tensor.shape), tensor, np.float32(0))


def drop(tensor: Floats, keep: npt.NDArray[np.bool_], density: float) -> Floats:
    """DARE: keep what the mask says and divide it by the density, so that the expected value stays."""
    if density >= 1:
        return tensor
    return np.divide(np.where(keep, tensor, np.float32(0)), np.float32(density), dtype=np.float32)


def weighted_sum(tensors: Sequence[Floats], weights: Sequence[np.float32]) -> Floats:
    """Sum of weight * tensor."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor * weight
    return total


def elected_mean(tensors: Sequence[Floats], weights: Sequence[np.float32], sign_method: str) -> Floats:
    """TIES: elect a sign for every element, then average the weighted tensors that have it.

    Semantics:
        The sign is that of the sum of the tensors ("total") or of their signs ("frequency"), before weighting; a sum of 0 is
        positive. The mean is over the tensors whose element has the elected sign; an element that is 0 has none.
    """
    signs = [np.sign(tensor) for tensor in tensors]
    ballot = sum_in_order(tensors if sign_method == "total" else signs)
    elected = np.where(ballot >= 0, np.float32(1), np.float32(-1))
    total = np.zeros_like(tensors[0])
    voters = np.zeros_like(tensors[0])
    for tensor, weight, sign in zip(tensors, weights, signs, strict=True):
        agrees = sign == elected
        total += np.where(agrees, tensor * weight, np.float32(0))
        voters += agrees
    return np.divide(total, np.maximum(voters, np.float32(1)), dtype=np.float32)


def sum_in_order(tensors: Sequence[Floats]) -> Floats:
    """The sum, first to last."""
    total = tensors[0].copy()
    for tensor in tensors[1:]:
        total += tensor
    return total


def padded(tensor: Floats, shape: tuple[int, int]) -> Floats:
    """`tensor` in the corner of zeros of a larger shape."""
    if tensor.shape == shape:
        return tensor
    result = np.zeros(shape, dtype=np.float32)
    result[: tensor.shape[0], : tensor.shape[1]] = tensor
    return result
