"""Rotary position embeddings as two tables: the cosine and sine of every position and frequency.

Sources: RoFormer (2104.09864); position interpolation (2306.15595); "dynamic NTK" as transformers 5 has it; Llama 3.1's model
card; YaRN (2309.00071). The tests compare every type with transformers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from node.models.rope_config import RopeConfig


def rope_tables(rope: RopeConfig, max_model_len: int, frequency_factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tabulate the rotation of every position the node will ever serve.

    Semantics:
        cos[p, i] = a * cos(p * f_i) and sin[p, i] = a * sin(p * f_i), with the type's frequencies f and attention factor a.
        Dimension i of a head is rotated together with dimension i + head_dim / 2.

    The dynamic type's frequencies depend on a length. transformers takes the longest position it has seen so far, so that
    its answer depends on what was computed before. Here the length is `max_model_len`, once and for all: up to the trained
    length that is the unscaled embedding, exactly transformers' answer for every sequence; beyond it, it is transformers'
    answer for a forward pass over `max_model_len` tokens, and a cached key stays valid whatever else is in the batch.

    Args:
        rope: What the model's configuration says.
        max_model_len: Positions to tabulate, > 0.
        frequency_factors: [head_dim / 2] float32 or None. Divisors of the frequencies, as GGUF files of Llama 3 carry them.

    Returns:
        cos, sin: [max_model_len, head_dim / 2] float32.
    """
    frequencies, attention_factor = inverse_frequencies(rope, max_model_len)
    if frequency_factors is not None:
        frequencies = frequencies / frequency_factors.float()
    angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * frequencies[None, :]
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def inverse_frequencies(rope: RopeConfig, max_model_len: int) -> tuple[Tensor, float]:
    """Return the frequencies [head_dim / 2] float32, in radians per position, and the factor on cos and sin."""
    if rope.rope_type == "linear":
        return _plain(rope.theta, rope.head_dim) / rope.factor, 1.0
    if rope.rope_type == "dynamic":
        return _plain(_dynamic_theta(rope, max_model_len), rope.head_dim), 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope), _yarn_attention_factor(rope)
    return _plain(rope.theta, rope.head_dim), 1.0


def _plain(theta: float, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (theta**exponents)


def _dynamic_theta(rope: RopeConfig, max_model_len: int) -> float:
    """A larger base for a longer context, so that the slowest dimension still spans it."""
    stretched = max(max_model_len, rope.trained_len) / rope.trained_len
    return float(rope.theta * (rope.factor * stretched - (rope.factor - 1)) ** (rope.head_dim / (rope.head_dim - 2)))


def _llama3(rope: RopeConfig) -> Tensor:
    """Keep fast dimensions, divide slow ones by the factor, and blend between the two wavelengths."""
    frequencies = _plain(rope.theta, rope.head_dim)
    turns = rope.original_len * frequencies / (2 * math.pi)  # over the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / rope.factor)


def _yarn(rope: RopeConfig) -> Tensor:
    """Interpolate the dimensions that turn fewer than `beta_slow` times, keep those beyond `beta_fast`, ramp between."""
    low, high = _yarn_dimension(rope, rope.beta_fast), _yarn_dimension(rope, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(rope.head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    frequencies = _plain(rope.theta, rope.head_dim)
    return frequencies / rope.factor * ramp + frequencies * (1.0 - ramp)


def _yarn_dimension(rope: RopeConfig, turns: float) -> float:
    """The dimension that turns `turns` times over the original context."""
    return rope.head_dim * math.log(rope.original_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
