"""Whether an adapter's configuration selects exactly the modules it has weights for, by PEFT's rules of selection."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from node.adapters.linear_table import LinearTable
from node.adapters.lora_config import LoraConfig, compile_targets
from node.adapters.name_pattern import NamePattern, StepBudget
from node.errors import AdapterInvalidError

MAX_NAMED = 3  # modules a message lists before it says how many more there are
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")  # PEFT's own rule: the first numbered segment
_PLAIN = re.compile(r"[\w.-]+")


def check_targets(found: set[str], config: LoraConfig, table: LinearTable) -> None:
    """The configuration selects exactly the modules the file has: PEFT ignores the others' weights, or leaves them untrained.

    Args:
        found: The adapter's modules, as it names them.

    Raises:
        AdapterInvalidError: adapter_config_invalid (weights for modules that are not selected), adapter_base_mismatch (selected
            modules without weights).
    """
    targets = _Selection(config.target_modules)
    excluded = _Selection(config.exclude_modules)
    layers = _Layers(config)
    if not targets.is_stated:
        return
    surplus = [name for name in found if targets.refuses(name) or excluded.selects(name) or layers.refuses(name)]
    if surplus:
        raise AdapterInvalidError(
            f"adapter_config.json does not select modules the file has weights for: {listed(sorted(surplus))}",
            code="adapter_config_invalid",
        )
    if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str) or not layers.is_understood:
        return  # an expression may select what this base model merely happens to have
    missing = [
        name
        for name in table.names()
        if name not in found and targets.selects(name) and not excluded.selects(name) and not layers.refuses(name)
    ]
    if missing:
        raise AdapterInvalidError(
            f"the adapter has no weights for {len(missing)} modules of this base model that its configuration selects:"
            f" {listed(missing)}; it was trained on another base, or the file is incomplete",
            code="adapter_base_mismatch",
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


class _Layers:
    """`layers_to_transform` with `layers_pattern`, which PEFT reads as the segment before a layer's number.

    A pattern that is more than a plain name decides nothing: the names of the tensors say which layers were trained.
    """

    def __init__(self, config: LoraConfig) -> None:
        self._chosen = frozenset(config.layers_to_transform)
        self.is_understood = all(_PLAIN.fullmatch(name) for name in config.layers_pattern)
        stated = [re.compile(rf".*?\.{re.escape(name)}\.(\d+)\.") for name in config.layers_pattern] if self.is_understood else []
        self._patterns = stated or [_LAYER]

    def refuses(self, name: str) -> bool:
        """Whether the module is certainly in no chosen layer."""
        if not self._chosen or not self.is_understood:
            return False
        matches = [pattern.match(name) for pattern in self._patterns]
        layer = next((match for match in matches if match is not None), None)
        return layer is None or int(layer[1]) not in self._chosen


def listed(names: Sequence[str]) -> str:
    """A few module names for a message."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(cut(name) for name in names[:MAX_NAMED]) + more


def cut(name: str) -> str:
    """A tensor's name for a message: printable and short, whatever the file says."""
    return repr(name if len(name) <= 120 else name[:117] + "...").strip("'")


def _suffixes(name: str) -> Iterable[str]:
    """ "a.b.c", "b.c", "c"."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name
