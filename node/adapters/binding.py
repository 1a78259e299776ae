"""Which linear module each tensor of an adapter belongs to, with its rank and scale; nothing else of an adapter is served.

The names of the tensors bind, not `target_modules`: they are what PEFT saved. The configuration must agree with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attribution.identity import normal_name
from node.adapters.lora_config import LoraConfig, ScaleTable, compile_targets
from node.adapters.name_pattern import NamePattern, StepBudget
from node.adapters.safetensors_file import TensorEntry
from node.errors import AdapterInvalidError
from node.request import LinearShape

MAX_NAMED = 3  # modules a message lists before it says how many more there are
_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B)\.weight")
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")  # PEFT's own rule: the first numbered segment
_FEATURES = {
    ".lora_embedding_A": "LoRA on embeddings",
    ".lora_embedding_B": "LoRA on embeddings",
    ".lora_magnitude_vector": "DoRA",
    ".bias": "trained biases",
}


@dataclass(frozen=True, slots=True)
class BoundModule:
    """One linear module of the base and the two tensors that change it: W x becomes W x + scale * B (A x).

    `a_tensor` is the file's name of A [rank, in_features], `b_tensor` of B [out_features, rank].
    """

    name: str
    rank: int
    scale: float
    in_features: int
    out_features: int
    a_tensor: str
    b_tensor: str


class LinearTable:
    """Every linear module of the base by its full name, in model order."""

    def __init__(self, linears: Sequence[LinearShape]) -> None:
        self.shapes: dict[str, LinearShape] = {
            linear.name.replace("{layer}", str(layer)): linear for linear in linears for layer in range(linear.layer_count)
        }


def bind(entries: Mapping[str, TensorEntry], config: LoraConfig, table: LinearTable) -> tuple[BoundModule, ...]:
    """Bind every tensor of an adapter to the base.

    Args:
        entries: `SafetensorsFile.entries`.
        config: The adapter's configuration.
        table: The base's linear modules.

    Returns:
        The bound modules in model order.

    Raises:
        AdapterInvalidError: adapter_base_mismatch (unknown modules, other shapes, modules missing), adapter_corrupt (half a
            pair), adapter_config_invalid (the configuration disagrees), adapter_feature_unsupported (tensors that are not LoRA
            factors of a linear module).
    """
    pairs = _pairs(entries)
    _refuse_unknown(pairs, table)
    scales = ScaleTable(config)
    bound = [_bind_module(name, pairs[name], scales, table.shapes[name]) for name in table.shapes if name in pairs]
    _check_targets(set(pairs), config, table)
    return tuple(bound)


def _pairs(entries: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """{module: {"lora_A": entry, "lora_B": entry}}."""
    pairs: dict[str, dict[str, TensorEntry]] = {}
    for entry in entries.values():
        found = _FACTOR.fullmatch(normal_name(entry.name))
        if found is None:
            raise _not_a_factor(entry.name)
        factors = pairs.setdefault(found[1], {})
        if found[2] in factors:
            raise AdapterInvalidError(f"two tensors are {found[2]} of {_cut(found[1])}; an adapter has each once")
        factors[found[2]] = entry
    for name, factors in pairs.items():
        if len(factors) == 1:
            missing = "lora_B" if "lora_A" in factors else "lora_A"
            raise AdapterInvalidError(f"{_cut(name)} has no {missing}; the file is incomplete")
    return pairs


def _not_a_factor(tensor: str) -> AdapterInvalidError:
    feature = next((name for mark, name in _FEATURES.items() if mark in tensor), "a whole module saved beside LoRA")
    return AdapterInvalidError(
        f"tensor {_cut(tensor)} is {feature}; this node serves lora_A.weight and lora_B.weight of linear modules only",
        code="adapter_feature_unsupported",
    )


def _refuse_unknown(pairs: Mapping[str, object], table: LinearTable) -> None:
    unknown = [name for name in pairs if name not in table.shapes]
    if not unknown:
        return
    if len(unknown) == len(pairs):
        message = f"none of the adapter's {len(pairs)} modules is a linear module of this base model: {_listed(unknown)}"
    else:
        message = f"{len(unknown)} of the adapter's {len(pairs)} modules are not in this base model: {_listed(unknown)}"
    raise AdapterInvalidError(f"{message}; it was trained on another base", code="adapter_base_mismatch")


def _bind_module(name: str, factors: Mapping[str, TensorEntry], scales: ScaleTable, linear: LinearShape) -> BoundModule:
    a, b = factors["lora_A"], factors["lora_B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise _mismatch(f"{name}: lora_A has shape {a.shape}, lora_B {b.shape}; the ranks (first of A, last of B) disagree")
    if a.shape[1] != linear.in_features or b.shape[0] != linear.out_features:
        raise _mismatch(
            f"{name} maps {a.shape[1]} to {b.shape[0]} features;"
            f" in this base model it maps {linear.in_features} to {linear.out_features}"
        )
    stated = scales.of(name)
    if stated.rank != a.shape[0]:
        raise AdapterInvalidError(
            f"{name} has rank {a.shape[0]}, but adapter_config.json says {stated.rank}", code="adapter_config_invalid"
        )
    return BoundModule(name, stated.rank, stated.scale, linear.in_features, linear.out_features, a.name, b.name)


def _mismatch(message: str) -> AdapterInvalidError:
    return AdapterInvalidError(message, code="adapter_base_mismatch")


def _check_targets(found: set[str], config: LoraConfig, table: LinearTable) -> None:
    """The configuration selects exactly the modules the file has: PEFT ignores the others' weights, or leaves them untrained."""
    targets = _Selection(config.target_modules)
    excluded = _Selection(config.exclude_modules)
    if not targets.is_stated:
        return
    surplus = [name for name in found if targets.refuses(name) or excluded.selects(name) or _is_outside_layers(name, config)]
    if surplus:
        raise AdapterInvalidError(
            f"adapter_config.json does not select modules the file has weights for: {_listed(sorted(surplus))}",
            code="adapter_config_invalid",
        )
    if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str):
        return  # an expression may select what this base model merely happens to have
    missing = [
        name
        for name in table.shapes
        if name not in found and targets.selects(name) and not excluded.selects(name) and not _is_outside_layers(name, config)
    ]
    if missing:
        raise _mismatch(
            f"the adapter has no weights for {len(missing)} modules of this base model that its configuration selects:"
            f" {_listed(missing)}; it was trained on another base, or the file is incomplete"
        )


class _Selection:
    """`target_modules` or `exclude_modules`: names, suffixes after a dot, or one expression over the whole name."""

    def __init__(self, stated: tuple[str, ...] | str) -> None:
        self.is_stated = bool(stated)
        self._names = frozenset(stated) if not isinstance(stated, str) else frozenset()
        self._pattern: NamePattern | None = None
        if isinstance(stated, str) and stated and stated.lower() != "all-linear":
            self._pattern = compile_targets(stated)
        self._is_open = isinstance(stated, str) and self._pattern is None
        self._budget = StepBudget()

    def selects(self, name: str) -> bool:
        """Whether the module is selected; never for an expression that is not understood."""
        if self._pattern is not None:
            return self._pattern.matches_all(name, self._budget)
        return any(suffix in self._names for suffix in _suffixes(name))

    def refuses(self, name: str) -> bool:
        """Whether the module is certainly not selected."""
        return not self._is_open and not self.selects(name)


def _suffixes(name: str) -> Iterable[str]:
    """ "a.b.c", "b.c", "c"."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _is_outside_layers(name: str, config: LoraConfig) -> bool:
    if not config.layers_to_transform:
        return False
    layer = _LAYER.match(name)
    return layer is None or int(layer[1]) not in config.layers_to_transform


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(_cut(name) for name in names[:MAX_NAMED]) + more


def _cut(name: str) -> str:
    """A tensor's name for a message: printable and short, whatever the file says."""
    return repr(name if len(name) <= 120 else name[:117] + "...").strip("'")
