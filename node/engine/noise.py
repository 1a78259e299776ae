"""The random number behind a draw: a function of (seed, choice index, position) and of nothing else.

A counter-based generator has no state to keep, so a draw is the same alone, in any batch, after preemption and after a restart.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): every input bit changes every output bit."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, choice_index: int, position: int) -> float:
    """Return a number in [0, 1) with 53 random bits.

    Args:
        seed: Any integer; its low 64 bits count.
        choice_index: Which of the request's answers.
        position: Absolute position of the token to draw, so a prompt and its continuation never reuse a number.
    """
    state = _mix(seed & _MASK)
    state = _mix(state ^ (choice_index & _MASK))
    state = _mix(state ^ (position & _MASK))
    return float(state >> 11) * 2.0**-53


def uniforms(seeds: npt.ArrayLike, choice_indexes: npt.ArrayLike, positions: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """`uniform` of many draws at once, the same numbers. Seeds are the low 64 bits, as uint64."""
    state = _mix_all(np.asarray(seeds, dtype=np.uint64))
    state = _mix_all(state ^ np.asarray(choice_indexes, dtype=np.uint64))
    state = _mix_all(state ^ np.asarray(positions, dtype=np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix_all(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`_mix` with numpy's arithmetic, which is modulo 2^64 by itself."""
    value = value + np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
