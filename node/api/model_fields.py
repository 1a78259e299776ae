"""Which model or adapters a request names."""

from __future__ import annotations

from node.adapters.locations import SOURCES
from node.api.fields import Fields
from node.api.generation import Limits, NamedTerm
from node.errors import RequestError, UnsupportedError

_MAX_NAME_CHARS = 1024
_MAX_TOKEN_CHARS = 4096


def read_model(fields: Fields) -> str:
    """`model` of the OpenAI shapes: required, "" is the base model as LoRAX has it."""
    model = fields.label("model", _MAX_NAME_CHARS)
    if model is None:
        raise fields.error("model", 'is required: the base model, an adapter, or "" for the base model')
    return model


def read_source(fields: Fields) -> tuple[str | None, str | None]:
    """(`adapter_source`, `api_token`). The token is the adapter source's own credential, never this node's key."""
    source = fields.label("adapter_source", 32)
    if source is not None and source.lower() not in SOURCES:
        raise fields.error("adapter_source", f"must be one of {', '.join(SOURCES)}")
    return source.lower() if source else None, fields.label("api_token", _MAX_TOKEN_CHARS)


def read_merge(fields: Fields, limits: Limits) -> tuple[NamedTerm, ...]:
    """LoRAX's `merged_adapters`: a linear merge is the weighted sum that the engine computes exactly, without making an adapter.

    Raises:
        UnsupportedError: ties, dare_linear, dare_ties (they need a derived adapter).
        RequestError: Empty ids, unequal lengths, an unknown strategy.
    """
    merge = fields.inner("merged_adapters")
    if merge is None:
        return ()
    ids = merge.items("ids", limits.max_terms) or []
    if not ids or not all(isinstance(name, str) and 0 < len(name) <= _MAX_NAME_CHARS and name.isprintable() for name in ids):
        raise merge.error("ids", "must be a list of adapter names, at least one")
    if len(set(ids)) != len(ids):
        raise merge.error("ids", "must not name an adapter twice")
    weights = merge.items("weights", limits.max_terms) or []
    if weights and len(weights) != len(ids):
        raise merge.error("weights", f"must have as many values as `ids` ({len(ids)})")
    _check_strategy(merge)
    return tuple(NamedTerm(name, weight) for name, weight in zip(ids, _read_weights(weights, len(ids)), strict=True))


def _read_weights(weights: list[object], count: int) -> list[float]:
    """LoRAX leaves weights out for equal ones, each 1."""
    if not weights:
        return [1.0] * count
    entries = Fields({f"[{index}]": weight for index, weight in enumerate(weights)}, prefix="merged_adapters.weights")
    values = [entries.number(f"[{index}]", -100, 100) for index in range(count)]
    if any(value is None for value in values):
        raise RequestError("`merged_adapters.weights` must not hold null; give every adapter a number", param="merged_adapters")
    return [value for value in values if value is not None]


def _check_strategy(merge: Fields) -> None:
    strategy = merge.label("merge_strategy", 32)
    merge.number("density", 0, 1)
    merge.label("majority_sign_method", 32)
    if strategy in (None, "linear"):
        return
    if strategy in ("ties", "dare_linear", "dare_ties"):
        raise UnsupportedError(
            f"`merged_adapters.merge_strategy` {strategy!r} is not supported by this node; use linear",
            param="merged_adapters.merge_strategy",
        )
    raise merge.error("merge_strategy", "must be linear, ties, dare_linear or dare_ties")
