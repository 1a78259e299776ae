"""What a model's configuration says about rotary position embeddings, checked and in one form.

transformers 5 writes `rope_parameters`; earlier checkpoints write `rope_theta` next to `rope_scaling`. Both end here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from node.errors import ModelLoadError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of one model. Fields beyond `rope_type`'s own needs keep their neutral value.

    Attributes:
        rope_type: One of `ROPE_TYPES`.
        theta: Base period, > 0.
        head_dim: Rotated dimensions of a head: all of them, an even number.
        trained_len: `max_position_embeddings`, tokens.
        factor: How far the context is stretched, >= 1.
        original_len: Context before stretching, tokens (llama3, yarn).
        low_freq_factor, high_freq_factor: Bounds of llama3's transition.
        attention_factor: yarn's factor on cos and sin; None derives it from `factor` and the mscales.
        beta_fast, beta_slow: Bounds of yarn's transition, in rotations over `original_len`.
        mscale, mscale_all_dim: yarn's numerator and denominator when `attention_factor` is None; 0 when not given.
        truncate: Whether yarn rounds the bounds of its transition to whole dimensions.
    """

    rope_type: str
    theta: float
    head_dim: int
    trained_len: int
    factor: float = 1.0
    original_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    @property
    def longest_len(self) -> int:
        """The longest context, in tokens, that this embedding was made for."""
        if self.rope_type in ("linear", "dynamic"):
            return int(self.trained_len * self.factor)
        if self.rope_type == "yarn":
            return max(self.trained_len, int(self.original_len * self.factor))
        return self.trained_len


def rope_config(config: Mapping[str, Any], head_dim: int, trained_len: int) -> RopeConfig:
    """Read the rotary embedding out of a transformers configuration.

    Args:
        config: The content of config.json.
        head_dim: Dimensions of a head, even.
        trained_len: `max_position_embeddings`, tokens.

    Raises:
        ModelLoadError: model_unsupported. Unknown type, partial rotary, per-layer parameters, or a missing or impossible number.
    """
    stated = _stated_parameters(config)
    rope_type = str(stated.get("rope_type", stated.get("type")) or "default")
    if rope_type not in ROPE_TYPES:
        raise ModelLoadError(
            f"rope_type is {rope_type!r}, which is not supported; known are {', '.join(ROPE_TYPES)}; use another base model"
        )
    partial = _number(stated, "partial_rotary_factor", _number(config, "partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ModelLoadError(
            f"partial_rotary_factor is {partial}; only models that rotate whole heads (1.0) are supported; use another base model"
        )
    theta = _number(stated, "rope_theta", _number(config, "rope_theta", _DEFAULT_THETA))
    original_len = int(_number(config, "original_max_position_embeddings", 0.0))
    original_len = original_len or int(_number(stated, "original_max_position_embeddings", float(trained_len)))
    factor = 1.0 if rope_type == "default" else _factor(stated, rope_type, trained_len, original_len)
    result = RopeConfig(
        rope_type=rope_type,
        theta=theta,
        head_dim=head_dim,
        trained_len=trained_len,
        factor=factor,
        original_len=original_len,
        low_freq_factor=_number(stated, "low_freq_factor", 1.0),
        high_freq_factor=_number(stated, "high_freq_factor", 4.0),
        attention_factor=_number(stated, "attention_factor", 0.0) if stated.get("attention_factor") is not None else None,
        beta_fast=_number(stated, "beta_fast", 0.0) or 32.0,
        beta_slow=_number(stated, "beta_slow", 0.0) or 1.0,
        mscale=_number(stated, "mscale", 0.0),
        mscale_all_dim=_number(stated, "mscale_all_dim", 0.0),
        truncate=bool(stated.get("truncate", True)),
    )
    _check(result)
    return result


def _stated_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_scaling` wins over `rope_parameters`, as in transformers."""
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(stated, Mapping):
        raise ModelLoadError(f"the rope parameters of config.json are {stated!r}; an object is needed")
    nested = [key for key, value in stated.items() if isinstance(value, Mapping)]
    if nested:
        raise ModelLoadError(
            f"the rope parameters differ by layer type ({', '.join(nested)}); one set for all layers is supported"
        )
    return stated


def _factor(stated: Mapping[str, Any], rope_type: str, trained_len: int, original_len: int) -> float:
    """The stretching factor; yarn may leave it out and state both lengths instead."""
    if stated.get("factor") is None:
        if rope_type == "yarn":
            return trained_len / max(original_len, 1)
        raise ModelLoadError(f"rope_type {rope_type!r} needs a factor and config.json has none; repair config.json")
    return _number(stated, "factor", 1.0)


def _number(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelLoadError(f"{key} of config.json is {value!r}; a number is needed")
    return float(value)


def _check(rope: RopeConfig) -> None:
    """Refuse numbers that would divide by zero or take the logarithm of a negative."""
    problems = {
        f"rope_theta is {rope.theta}; it must be above 1": rope.theta > 1,
        f"the rope factor is {rope.factor}; it must be at least 1": rope.factor >= 1,
        f"head_dim is {rope.head_dim}; rotary embeddings need an even number of at least 4": (
            rope.head_dim >= 4 and rope.head_dim % 2 == 0
        ),
        f"original_max_position_embeddings is {rope.original_len}; it must be at least 1": rope.original_len >= 1,
        f"high_freq_factor {rope.high_freq_factor} must be above low_freq_factor {rope.low_freq_factor}, which must be above 0": (
            0 < rope.low_freq_factor < rope.high_freq_factor
        ),
        f"beta_fast {rope.beta_fast} must be above beta_slow {rope.beta_slow}, which must be above 0": (
            0 < rope.beta_slow < rope.beta_fast
        ),
    }
    for problem, holds in problems.items():
        if not holds:
            raise ModelLoadError(f"{problem}; repair config.json or use another base model")
