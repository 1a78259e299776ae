"""Adapter names to verified adapters, and several of them to one where a merge asks for it."""

from __future__ import annotations

from dataclasses import dataclass

from attribution.record import Merge
from node.adapters.entry import NameFilter
from node.adapters.merges.recipe import MergeRecipe, MergeSource
from node.api.doors import Catalog, CatalogEntry, Merger, RecipeEntry
from node.api.generation import Generation
from node.errors import AdapterNotFoundError, ModelNotFoundError, RequestError, UnsupportedError
from node.request import AdapterTerm

LORAX_BASE = "__base_model__"  # what LoRAX calls the base model beside its name


@dataclass(frozen=True, slots=True)
class ResolvedRecipe:
    """What a request is answered with.

    Attributes:
        entries: Every adapter the client named, in order: who is recorded and paid.
        merge: How they became one, or None.
        terms: What the engine adds: the entries themselves, or the one adapter made of them.
    """

    entries: tuple[RecipeEntry, ...] = ()
    merge: Merge | None = None
    terms: tuple[AdapterTerm, ...] = ()


class Recipes:
    """Resolves what a request names. The base model's name, and nothing, stand for the base model.

    Args:
        merger: Makes derived adapters; None refuses every merge that is more than a sum.
    """

    def __init__(self, catalog: Catalog, base_name: str, merger: Merger | None = None) -> None:
        self._catalog = catalog
        self._base_name = base_name
        self._merger = merger

    async def resolve(self, generation: Generation, sees: NameFilter, owner: str) -> ResolvedRecipe:
        """The request's adapters, in order, by content. `sees` tells which names exist for the caller, `owner` whose
        registered ones.

        Raises:
            ModelNotFoundError: `model` is neither the base model nor an adapter.
            AdapterError: The adapter exists and cannot be used, or the adapters cannot be merged.
            RequestError: Two names of one adapter, the base among adapters, or `adapters` beside a model that is not the base.
        """
        if generation.lists_adapters and generation.model not in ("", self._base_name):
            raise RequestError(
                f'adapters change the base model: send model {self._base_name!r} or "", or name the adapter in `model` alone',
                param="model",
            )
        names = [self._adapter_name(term.name) for term in generation.terms]
        if names == [""]:
            return ResolvedRecipe()
        if "" in names:
            raise RequestError(
                f"{self._base_name!r} is the base model, which every adapter is added to: name the adapters alone",
                param="adapters" if generation.lists_adapters else "model",
            )
        found = [await self._find(name, generation, sees, owner) for name in names]
        entries = tuple(RecipeEntry(entry, term.weight) for entry, term in zip(found, generation.terms, strict=True))
        if len({item.entry.adapter_id for item in entries}) != len(entries):
            raise RequestError("two of the named adapters are the same by content; name it once", param="merged_adapters.ids")
        terms = engine_terms(entries) if generation.merge is None else (await self._merged(entries, generation.merge),)
        return ResolvedRecipe(entries, generation.merge, terms)

    def _adapter_name(self, name: str) -> str:
        """An adapter's own name, "" for the base model. SGLang calls an adapter `base:adapter`."""
        if name in (self._base_name, LORAX_BASE):
            return ""
        return name.removeprefix(f"{self._base_name}:")

    async def _merged(self, entries: tuple[RecipeEntry, ...], merge: Merge) -> AdapterTerm:
        if self._merger is None:
            raise UnsupportedError(
                f"`merge_strategy` {merge.strategy!r} is not supported by this node; use linear", param="merge_strategy"
            )
        sources = tuple(MergeSource(item.entry.adapter_id, item.entry.directory, item.weight) for item in entries)
        derived = await self._merger.derive(MergeRecipe(merge, sources))
        return AdapterTerm(derived.adapter_id, str(derived.directory), 1.0)

    async def _find(self, name: str, generation: Generation, sees: NameFilter, owner: str) -> CatalogEntry:
        try:
            return await self._catalog.resolve(name, generation.adapter_source, generation.adapter_token, sees=sees, owner=owner)
        except AdapterNotFoundError as error:
            if generation.shape == "lorax" or error.error_code == "adapter_unloaded":
                raise
            raise ModelNotFoundError(
                f"the model {name!r} does not exist: it is neither the base model {self._base_name!r} nor an adapter that this "
                "node knows; GET /v1/models lists them",
                param="model",
            ) from error


def engine_terms(recipe: tuple[RecipeEntry, ...]) -> tuple[AdapterTerm, ...]:
    """The adapters as the engine reads them, all added to the base."""
    return tuple(AdapterTerm(item.entry.adapter_id, str(item.entry.directory), float(item.weight)) for item in recipe)
