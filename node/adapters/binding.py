"""Which module of the base each tensor of an adapter belongs to, with its rank and scale; nothing else of an adapter is served.

The names of the tensors bind, not `target_modules`: they are what PEFT saved. The configuration must agree with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from attribution.identity import normal_name
from node.adapters.linear_table import EMBEDDING, LinearTable, Place
from node.adapters.lora_config import LoraConfig, ScaleTable
from node.adapters.safetensors_file import TensorEntry
from node.adapters.targets import check_targets, cut, listed
from node.errors import AdapterInvalidError

__all__ = ["Binding", "BoundEmbedding", "BoundModule", "LinearTable", "bind"]

# The parts of an adapted module by the end of a tensor's normal name; PEFT wrote the magnitude in three ways.
_PARTS = re.compile(
    r"(?P<module>.+)\.(?:(?P<factor>lora_[AB])\.weight|(?P<bias>lora_B)\.bias"
    r"|lora_(?P<embedding>embedding_[AB])(?:\.\w+)?|lora_(?P<magnitude>magnitude_vector)(?:\.\w+)?)"
)
_COPY = re.compile(r"(model\.embed_tokens|lm_head)(?:\.base_layer)?\.weight")


@dataclass(frozen=True, slots=True)
class BoundModule:
    """One linear module of the base and the tensors that change it: W x becomes g * (W x + scale * (B (A x) + bias)).

    `a_tensor` is the file's name of A [rank, in_features], `b_tensor` of B. A module that the adapter trained together with its
    neighbours (q, k and v as one) owns the `out_features` rows of B, magnitude and bias from `first_row` on. `magnitude_tensor`
    is DoRA's m, with g = m / ||W + scale B A|| by row; None means g = 1. `bias_tensor` is lora_B's own bias, or None.
    """

    name: str
    rank: int
    scale: float
    in_features: int
    out_features: int
    a_tensor: str
    b_tensor: str
    first_row: int = 0
    magnitude_tensor: str | None = None
    bias_tensor: str | None = None

    @property
    def needs_side(self) -> bool:
        """Whether rank pages alone do not hold what this module does."""
        return self.magnitude_tensor is not None or self.bias_tensor is not None


@dataclass(frozen=True, slots=True)
class BoundEmbedding:
    """The embedding: E[t] becomes g * (E[t] + scale * B A[:, t]), with A [rank, V], B [H, rank] and g [H] as above."""

    rank: int
    scale: float
    vocab_size: int
    hidden_size: int
    a_tensor: str
    b_tensor: str
    magnitude_tensor: str | None


@dataclass(frozen=True, slots=True)
class Binding:
    """An adapter on this base.

    Attributes:
        modules: Bound linear modules in model order.
        embedding: The adapted embedding, or None.
        copies: Tensors that only repeat a matrix of the base, {tensor: "model.embed_tokens" or "lm_head"}: PEFT saves them beside
            adapters of the embedding. Whoever has the base's weights compares; see `node.adapters.side`.
    """

    modules: tuple[BoundModule, ...]
    embedding: BoundEmbedding | None = None
    copies: tuple[tuple[str, str], ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank of any module, the embedding included."""
        return max([module.rank for module in self.modules] + [0 if self.embedding is None else self.embedding.rank])

    @property
    def page_rank_needed(self) -> int:
        """The largest rank of any linear module: what decides the number of pages."""
        return max((module.rank for module in self.modules), default=0)


def bind(entries: Mapping[str, TensorEntry], config: LoraConfig, table: LinearTable) -> Binding:
    """Bind every tensor of an adapter to the base.

    Args:
        entries: `TensorFile.entries`.
        config: The adapter's configuration.
        table: The base's linear modules.

    Raises:
        AdapterInvalidError: adapter_base_mismatch (unknown modules, other shapes, modules missing), adapter_corrupt (half a
            pair), adapter_config_invalid (the configuration disagrees), adapter_feature_unsupported (tensors that are not LoRA
            factors).
    """
    parts, copies = _parts(entries, table)
    _refuse_unknown(parts, table)
    scales = ScaleTable(config)
    embedding = _bind_embedding(parts[EMBEDDING], config, scales, table) if EMBEDDING in parts else None
    bound: dict[str, BoundModule] = {}
    for name in parts:
        for place in table.places(name):
            if place.module in bound:
                raise AdapterInvalidError(f"two of the adapter's modules are {place.module} of this base model")
            bound[place.module] = _bind_module(name, place, parts[name], config, scales, table)
    check_targets(set(parts), config, table)
    return Binding(tuple(bound[name] for name in table.shapes if name in bound), embedding, copies)


def _parts(
    entries: Mapping[str, TensorEntry], table: LinearTable
) -> tuple[dict[str, dict[str, TensorEntry]], tuple[tuple[str, str], ...]]:
    """{module: {"lora_A": entry, "lora_B": entry, ...}}, and the copies of the base's own matrices."""
    parts: dict[str, dict[str, TensorEntry]] = {}
    copies: list[tuple[str, str]] = []
    for entry in entries.values():
        name = normal_name(entry.name)
        copy = _COPY.fullmatch(name)
        if copy is not None:
            copies.append((entry.name, _check_copy(copy[1], entry, table)))
            continue
        found = _PARTS.fullmatch(name)
        if found is None:
            raise _not_a_factor(entry.name)
        kind = found["factor"] or found["embedding"] or found["magnitude"] or "bias"
        known = parts.setdefault(found["module"], {})
        if kind in known:
            raise AdapterInvalidError(f"two tensors are {kind} of {cut(found['module'])}; an adapter has each once")
        known[kind] = entry
    if not parts:
        raise AdapterInvalidError("the adapter has no LoRA factors")
    return parts, tuple(copies)


def _check_copy(module: str, entry: TensorEntry, table: LinearTable) -> str:
    if table.embedding is None or entry.shape != table.embedding:
        raise AdapterInvalidError(
            f"tensor {cut(entry.name)} is a whole {module} of shape {entry.shape}; this base model's is {table.embedding}:"
            " added or trained tokens are not served",
            code="adapter_feature_unsupported",
        )
    return module


def _not_a_factor(tensor: str) -> AdapterInvalidError:
    feature = "trained biases" if tensor.endswith(".bias") else "a whole module saved beside LoRA"
    return AdapterInvalidError(
        f"tensor {cut(tensor)} is {feature}; this node serves LoRA and DoRA on linear modules and the embedding",
        code="adapter_feature_unsupported",
    )


def _refuse_unknown(parts: Mapping[str, object], table: LinearTable) -> None:
    unknown = [name for name in parts if not table.has(name)]
    if not unknown:
        return
    if len(unknown) == len(parts):
        message = f"none of the adapter's {len(parts)} modules is a linear module of this base model: {listed(unknown)}"
    else:
        message = f"{len(unknown)} of the adapter's {len(parts)} modules are not in this base model: {listed(unknown)}"
    raise AdapterInvalidError(f"{message}; it was trained on another base", code="adapter_base_mismatch")


def _pair(name: str, parts: Mapping[str, TensorEntry], prefix: str) -> tuple[TensorEntry, TensorEntry]:
    """A and B, present and of one rank."""
    for side in "AB":
        if prefix + side not in parts:
            raise AdapterInvalidError(f"{cut(name)} has no {prefix}{side}; the file is incomplete")
    a, b = parts[prefix + "A"], parts[prefix + "B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise _mismatch(f"{name}: {prefix}A has shape {a.shape}, {prefix}B {b.shape}; the ranks (first of A, last of B) disagree")
    return a, b


def _bind_module(
    name: str, place: Place, parts: Mapping[str, TensorEntry], config: LoraConfig, scales: ScaleTable, table: LinearTable
) -> BoundModule:
    a, b = _pair(name, parts, "lora_")
    in_features, out_features = table.features(name)
    if a.shape[1] != in_features or b.shape[0] != out_features:
        raise _mismatch(
            f"{name} maps {a.shape[1]} to {b.shape[0]} features; in this base model it maps {in_features} to {out_features}"
        )
    rank, scale = _scale(name, a, scales)
    magnitude = _vector(name, parts, "magnitude_vector", config.use_dora, "use_dora", out_features)
    bias = _vector(name, parts, "bias", config.has_lora_bias, "lora_bias", out_features)
    return BoundModule(place.module, rank, scale, in_features, place.row_count, a.name, b.name, place.first_row, magnitude, bias)


def _bind_embedding(
    parts: Mapping[str, TensorEntry], config: LoraConfig, scales: ScaleTable, table: LinearTable
) -> BoundEmbedding:
    a, b = _pair(EMBEDDING, parts, "embedding_")
    if table.embedding is None or (a.shape[1], b.shape[0]) != table.embedding:
        raise _mismatch(
            f"{EMBEDDING} has {a.shape[1]} tokens of {b.shape[0]} features; in this base model {table.embedding}"
            " (added tokens are not served)"
        )
    rank, scale = _scale(EMBEDDING, a, scales)
    magnitude = _vector(EMBEDDING, parts, "magnitude_vector", config.use_dora, "use_dora", b.shape[0])
    return BoundEmbedding(rank, scale, a.shape[1], b.shape[0], a.name, b.name, magnitude)


def _scale(name: str, a: TensorEntry, scales: ScaleTable) -> tuple[int, float]:
    stated = scales.of(name)
    if stated.rank != a.shape[0]:
        raise AdapterInvalidError(
            f"{name} has rank {a.shape[0]}, but adapter_config.json says {stated.rank}", code="adapter_config_invalid"
        )
    return stated.rank, stated.scale


def _vector(name: str, parts: Mapping[str, TensorEntry], kind: str, is_wanted: bool, field: str, size: int) -> str | None:
    """The tensor's name of a magnitude or bias, which is there exactly when the configuration says so."""
    entry = parts.get(kind)
    if (entry is not None) != is_wanted:
        there = "has" if entry is not None else "lacks"
        raise AdapterInvalidError(
            f"{cut(name)} {there} a {kind}, but adapter_config.json has {field} = {str(is_wanted).lower()}",
            code="adapter_config_invalid",
        )
    if entry is None:
        return None
    if sorted(entry.shape)[-1] != size or sum(length > 1 for length in entry.shape) > 1:
        raise _mismatch(f"{name}: {kind} has shape {entry.shape}; {size} values are needed")
    return entry.name


def _mismatch(message: str) -> AdapterInvalidError:
    return AdapterInvalidError(message, code="adapter_base_mismatch")
