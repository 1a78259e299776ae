"""The base's modules by the names an adapter may call them, checkpoints with fused matrices included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from node.request import LinearShape

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
# What Phi's checkpoints, and adapters trained on them, hold as one matrix; rows in this order.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True, slots=True)
class Place:
    """Rows [first_row, first_row + row_count) of an adapter's module are the linear module `module` of the base."""

    module: str
    first_row: int
    row_count: int


class LinearTable:
    """Every linear module of the base by its full name.

    Attributes:
        shapes: In model order.
        embedding: (V, H), or None where the base's output projection is unknown.
    """

    def __init__(self, linears: Sequence[LinearShape]) -> None:
        self.shapes: dict[str, LinearShape] = {
            linear.name.replace("{layer}", str(layer)): linear for linear in linears for layer in range(linear.layer_count)
        }
        head = self.shapes.get(HEAD)
        self.embedding = None if head is None else (head.out_features, head.in_features)
        self._fused = dict(self._find_fused())

    def names(self) -> Iterator[str]:
        """Every name an adapter may use: modules, fused modules, the embedding."""
        yield from self.shapes
        yield from self._fused
        if self.embedding is not None:
            yield EMBEDDING

    def has(self, name: str) -> bool:
        """Whether an adapter may call a module so."""
        return name in self.shapes or name in self._fused or (name == EMBEDDING and self.embedding is not None)

    def places(self, name: str) -> tuple[Place, ...]:
        """The linear modules that an adapter's module covers; none for the embedding."""
        if name in self._fused:
            return self._fused[name]
        shape = self.shapes.get(name)
        return () if shape is None else (Place(name, 0, shape.out_features),)

    def features(self, name: str) -> tuple[int, int]:
        """(in_features, out_features) of an adapter's linear module."""
        places = self.places(name)
        return self.shapes[places[0].module].in_features, sum(place.row_count for place in places)

    def _find_fused(self) -> Iterator[tuple[str, tuple[Place, ...]]]:
        for name in self.shapes:
            head, _, last = name.rpartition(".")
            for fused, parts in FUSED.items():
                siblings = [f"{head}.{part}" for part in parts]
                if last == parts[0] and f"{head}.{fused}" not in self.shapes and all(part in self.shapes for part in siblings):
                    yield f"{head}.{fused}", tuple(self._stack(siblings))

    def _stack(self, names: Sequence[str]) -> Iterator[Place]:
        first = 0
        for name in names:
            count = self.shapes[name].out_features
            yield Place(name, first, count)
            first += count
