"""A merge of several adapters into one: what exactly is asked for, and the hash that names it.

Strategies, in the words of PEFT's `add_weighted_adapter` (LoRAX offers the same four names):
- "linear": base + sum of weight * scale * B A, exact. Nothing is made: the engine adds the terms of every row. PEFT calls this
  "cat". It is not what PEFT calls "linear", which sums A and B apart and so mixes A of one adapter with B of another, nor what
  LoRAX calls so, which does the same and counts every weight twice.
- "linear_factors": PEFT's "linear": A is the sum of sqrt(weight * scale) * A, B likewise; a negative weight turns A around.
- "ties" (2306.01708), "dare_linear", "dare_ties" (2311.03099): PEFT's, on A and B apart, with the same roots.

The result has scale 1. PEFT keeps the rsLoRA flag of the first adapter on it, which multiplies the merge by sqrt(rank) once more;
that is not repeated here. Adapters of different ranks are padded with zeros to the largest, after pruning (PEFT and LoRAX refuse
them). DARE's masks come from `masks`, never from a random source, so a recipe has one result everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from attribution.record import MERGE_STRATEGIES, Merge, RecipeTerm, recipe_hash

STRATEGIES = ("linear", *MERGE_STRATEGIES)


@dataclass(frozen=True, slots=True)
class MergeSource:
    """One adapter of a merge. `weight` is a plain decimal as the record spells it."""

    adapter_id: str
    directory: Path
    weight: str


@dataclass(frozen=True, slots=True)
class MergeRecipe:
    """At least two adapters in order, and how they become one. `merge.strategy` is not "linear"."""

    merge: Merge
    sources: tuple[MergeSource, ...]

    def recipe_hash(self) -> str:
        """64 hex digits: the same as `recipe.recipe_hash` of the records of requests that use it."""
        return recipe_hash(tuple(RecipeTerm(item.adapter_id, None, item.weight) for item in self.sources), self.merge)

    @property
    def density(self) -> Decimal:
        """The part of each tensor that pruning keeps; 1 where nothing is pruned."""
        return Decimal(1) if self.merge.density is None else Decimal(self.merge.density)

    def to_json(self) -> dict[str, Any]:
        """For the process that makes it."""
        return {
            "strategy": self.merge.strategy,
            "density": self.merge.density,
            "majority_sign_method": self.merge.majority_sign_method,
            "sources": [
                {"adapter_id": item.adapter_id, "directory": str(item.directory), "weight": item.weight} for item in self.sources
            ],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> MergeRecipe:
        """The inverse of `to_json`."""
        sources = tuple(MergeSource(item["adapter_id"], Path(item["directory"]), item["weight"]) for item in values["sources"])
        return cls(Merge(values["strategy"], values["density"], values["majority_sign_method"]), sources)
