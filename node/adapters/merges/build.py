"""Make the derived adapter of a recipe: a directory like any other adapter's, with scale 1 and one rank throughout.

One tensor of all adapters is in memory at a time. What was read is hashed, so that the result is what the recipe names even when
a file was replaced after it was verified.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from attribution import identity
from attribution.treehash import tree_hash
from node.adapters.binding import bind
from node.adapters.formats.layout import CONFIG_FILE, WEIGHTS_FILE
from node.adapters.formats.opening import OpenAdapter, open_adapter
from node.adapters.linear_table import LinearTable
from node.adapters.lora_config import ScaleTable
from node.adapters.merges import arithmetic
from node.adapters.merges.arithmetic import Floats
from node.adapters.merges.masks import keep_mask
from node.adapters.merges.recipe import MergeRecipe
from node.errors import AdapterChangedError, AdapterInvalidError

RECIPE_FILE = "recipe.json"


@dataclass(slots=True)
class _Source:
    """One open adapter. `tensors`: {(module, "A" or "B"): the file's name}."""

    adapter_id: str
    weight: float
    adapter: OpenAdapter
    scales: ScaleTable
    tensors: Mapping[tuple[str, str], str]
    roots: dict[str, str] = field(default_factory=dict)

    def read(self, module: str, side: str) -> tuple[str, Floats]:
        """The normal name and the numbers of one factor; remembers its hash."""
        name = self.tensors[module, side]
        values = self.adapter.file.read(name)
        self.roots[name] = tree_hash(values.tobytes())
        if values.dtype == np.uint16:
            return identity.normal_name(name), (values.astype(np.uint32) << 16).view(np.float32)
        return identity.normal_name(name), values.astype(np.float32, copy=False)


def build(recipe: MergeRecipe, target: Path, table: LinearTable, *, max_rank: int, max_bytes: int) -> None:
    """Write adapter_config.json, adapter_model.safetensors and recipe.json into `target`, an existing empty directory.

    Args:
        table: The base's linear modules.
        max_rank: Limit on ranks. max_bytes: limit on each source's file and on the result.

    Raises:
        AdapterInvalidError: An adapter that only an exact sum can hold (DoRA, biases, embeddings), modules that do not line up,
            a result beyond max_bytes.
        AdapterChangedError: A source's files are not those of its hash.
    """
    with ExitStack() as stack:
        sources = [
            _open(
                item.adapter_id,
                float(item.weight),
                stack.enter_context(open_adapter(item.directory, table.shapes, max_rank=max_rank, max_bytes=max_bytes)),
                table,
            )
            for item in recipe.sources
        ]
        modules = _modules(sources)
        rank = max(entry.shape[0] for source in sources for entry in _entries(source, "A"))
        shapes = {
            f"base_model.model.{module}.lora_{side}.weight": _shape(table, module, side, rank)
            for module in modules
            for side in "AB"
        }
        _check_size(shapes, max_bytes)
        _write_file(target / WEIGHTS_FILE, shapes, (_merged(recipe, sources, m, s, table, rank) for m in modules for s in "AB"))
        for source in sources:
            _check_hash(source)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": modules}
    (target / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    (target / RECIPE_FILE).write_text(json.dumps({**recipe.to_json(), "recipe_hash": recipe.recipe_hash()}), encoding="utf-8")


def _open(adapter_id: str, weight: float, adapter: OpenAdapter, table: LinearTable) -> _Source:
    binding = bind(adapter.file.entries, adapter.config, table)
    if binding.embedding is not None or binding.copies or any(module.needs_side for module in binding.modules):
        raise AdapterInvalidError(
            f"adapter {adapter_id} has DoRA magnitudes, biases or an embedding; only a linear merge can hold those",
            code="adapter_feature_unsupported",
        )
    tensors: dict[tuple[str, str], str] = {}
    for name in adapter.file.entries:
        module, _, rest = identity.normal_name(name).rpartition(".lora_")
        tensors[module, rest[0]] = name
    return _Source(adapter_id, weight, adapter, ScaleTable(adapter.config), tensors)


def _modules(sources: Sequence[_Source]) -> list[str]:
    """Every adapted module, sorted. A fused module of one adapter beside its parts in another has no common tensor."""
    modules = sorted({module for source in sources for module, _ in source.tensors})
    blocks = {module.rpartition(".")[0] for module in modules}
    for block in blocks:
        names = {module.rpartition(".")[2] for module in modules if module.rpartition(".")[0] == block}
        is_mixed = ("qkv_proj" in names and names & {"q_proj", "k_proj", "v_proj"}) or (
            "gate_up_proj" in names and names & {"gate_proj", "up_proj"}
        )
        if is_mixed:
            raise AdapterInvalidError(
                f"in {block} one adapter has fused modules and another their parts; only a linear merge can hold both",
                code="adapter_feature_unsupported",
            )
    return modules


def _entries(source: _Source, side: str) -> Iterator[Any]:
    return (source.adapter.file.entries[name] for (_, found), name in source.tensors.items() if found == side)


def _shape(table: LinearTable, module: str, side: str, rank: int) -> tuple[int, int]:
    in_features, out_features = table.features(module)
    return (rank, in_features) if side == "A" else (out_features, rank)


def _check_size(shapes: Mapping[str, tuple[int, int]], max_bytes: int) -> None:
    size = sum(4 * rows * columns for rows, columns in shapes.values())
    if size > max_bytes:
        raise AdapterInvalidError(
            f"the merged adapter would have {size} bytes; the limit is {max_bytes} (adapters.max_adapter_bytes)",
            code="adapter_too_large",
        )


def _merged(recipe: MergeRecipe, sources: Sequence[_Source], module: str, side: str, table: LinearTable, rank: int) -> Floats:
    """One factor of the result: of the adapters that have the module, as PEFT does it."""
    having = [source for source in sources if (module, side) in source.tensors]
    weights = [
        arithmetic.factor_weights(source.weight, source.scales.of(module).scale)[0 if side == "A" else 1] for source in having
    ]
    shape = _shape(table, module, side, rank)
    tensors = [arithmetic.padded(_pruned(recipe, source, module, side), shape) for source in having]
    if recipe.merge.majority_sign_method is not None:
        return arithmetic.elected_mean(tensors, weights, recipe.merge.majority_sign_method)
    return arithmetic.weighted_sum(tensors, weights)


def _pruned(recipe: MergeRecipe, source: _Source, module: str, side: str) -> Floats:
    name, values = source.read(module, side)
    strategy, density = recipe.merge.strategy, float(recipe.density)
    if strategy == "ties":
        return arithmetic.prune_smallest(values, density)
    if strategy in ("dare_linear", "dare_ties"):
        return arithmetic.drop(values, keep_mask(source.adapter_id, name, values.shape, recipe.density), density)
    return values


def _check_hash(source: _Source) -> None:
    entries = source.adapter.file.entries
    described = sorted(
        (identity.normal_name(name), entries[name].dtype, entries[name].shape, root) for name, root in source.roots.items()
    )
    found = identity.adapter_id_of_roots(described, source.adapter.config.raw)
    if found != source.adapter_id:
        raise AdapterChangedError(
            f"an adapter's files hash to {found} and {source.adapter_id} was to be merged; they changed after they were verified"
        )


def _write_file(path: Path, shapes: Mapping[str, tuple[int, int]], tensors: Iterable[Floats]) -> None:
    """A safetensors file of float32 tensors, written one after the other."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (rows, columns) in shapes.items():
        end = offset + 4 * rows * columns
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in tensors:
            if not np.isfinite(tensor).all():
                raise AdapterInvalidError("the merged adapter holds NaN or infinity; lower the weights", code="adapter_nonfinite")
            file.write(np.ascontiguousarray(tensor, dtype="<f4").data)
        file.flush()
        os.fsync(file.fileno())
