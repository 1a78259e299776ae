"""Adapter names to verified adapters."""

from __future__ import annotations

from node.adapters.catalog import NameFilter
from node.api.doors import Catalog, CatalogEntry, RecipeEntry
from node.api.generation import Generation
from node.errors import AdapterNotFoundError, ModelNotFoundError, RequestError
from node.request import AdapterTerm

# Weights are exact decimals in the record; twelve places are more than a float32 kernel can tell apart.
_WEIGHT_DECIMALS = 12


class Recipes:
    """Resolves what a request names. The base model's name, and nothing, stand for the base model."""

    def __init__(self, catalog: Catalog, base_name: str) -> None:
        self._catalog = catalog
        self._base_name = base_name

    async def resolve(self, generation: Generation, sees: NameFilter) -> tuple[RecipeEntry, ...]:
        """The request's adapters, in order, by content. `sees` tells which names exist for the caller.

        Raises:
            ModelNotFoundError: `model` is neither the base model nor an adapter.
            AdapterError: The adapter exists and cannot be used.
            RequestError: Two names of one adapter, or weights that are all zero.
        """
        if [term.name for term in generation.terms] == [self._base_name]:
            return ()
        found = [await self._find(term.name, generation, sees) for term in generation.terms]
        recipe = tuple(
            RecipeEntry(entry, round(term.weight, _WEIGHT_DECIMALS)) for entry, term in zip(found, generation.terms, strict=True)
        )
        if len({item.entry.adapter_id for item in recipe}) != len(recipe):
            raise RequestError("two of the named adapters are the same by content; name it once", param="merged_adapters.ids")
        if recipe and not any(item.weight for item in recipe):
            raise RequestError("every weight of the merge is 0; give one adapter a weight", param="merged_adapters.weights")
        return recipe

    async def _find(self, name: str, generation: Generation, sees: NameFilter) -> CatalogEntry:
        try:
            return await self._catalog.resolve(name, generation.adapter_source, generation.adapter_token, sees=sees)
        except AdapterNotFoundError as error:
            if generation.shape == "lorax":
                raise
            raise ModelNotFoundError(
                f"the model {name!r} does not exist: it is neither the base model {self._base_name!r} nor an adapter that this "
                "node knows; GET /v1/models lists them",
                param="model",
            ) from error


def engine_terms(recipe: tuple[RecipeEntry, ...]) -> tuple[AdapterTerm, ...]:
    """The recipe as the engine reads it."""
    return tuple(AdapterTerm(item.entry.adapter_id, str(item.entry.directory), item.weight) for item in recipe)
