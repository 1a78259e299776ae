"""Content hashes of adapters and base models: the names that cannot move.

`adapter_id` covers what changes the arithmetic and nothing else. Reordering the header of a safetensors file, renaming the
adapter inside PEFT, or editing a description leaves it alone; one bit of one weight, or lora_alpha, does not.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from attribution import canonical
from attribution.errors import IdentityError
from attribution.treehash import Buffer, map_threads, tree_hash, tree_hash_file

ADAPTER_SCHEMA = "openlora.adapter/1"
BASE_SCHEMA = "openlora.base/1"

# Fields of adapter_config.json that change what is computed, with the value PEFT assumes when one is absent or null.
# `target_modules` is left out because tensor names say the same; the layer fields stay because a loader may honour them.
ARITHMETIC_FIELDS: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "bias": "none",
    "fan_in_fan_out": False,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 8,
    "lora_bias": False,
    "peft_type": "LORA",
    "r": 8,
    "rank_pattern": {},
    "use_dora": False,
    "use_rslora": False,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of an adapter file.

    `name` as in the file, `dtype` as safetensors spells it ("BF16"), `shape` in elements, `read()` gives its raw little-endian
    bytes and may be called from another thread.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Buffer]


def adapter_id(tensors: Sequence[TensorEntry], config: Mapping[str, Any], *, threads: int | None = None) -> str:
    """Content hash of a LoRA adapter, 64 hex digits.

    Semantics:
        SHA-256 of the canonical JSON {schema, config, tensors: [[name, dtype, shape, tree hash v1 of the bytes], ...]} with
        normalised names in order and only ARITHMETIC_FIELDS of the configuration, defaults filled in.

    Args:
        tensors: Every tensor of the adapter, in any order.
        config: The parsed adapter_config.json; fields that do not change the arithmetic are ignored.
        threads: Threads that hash; None is one for each core, at most 8.

    Raises:
        IdentityError: No tensors, two tensors with one normalised name, or a setting that has no exact spelling.
    """
    entries = sorted(((normal_name(entry.name), entry) for entry in tensors), key=lambda pair: pair[0])
    if not entries:
        raise IdentityError("an adapter without tensors has no identity; the file is empty")
    for (name, _), (following, _) in itertools.pairwise(entries):
        if name == following:
            raise IdentityError(f"two tensors normalise to the name {name}; an adapter names each tensor once")
    roots = map_threads(lambda pair: bytes.fromhex(tree_hash(pair[1].read())), entries, threads)
    described = [(name, entry.dtype, entry.shape, root.hex()) for (name, entry), root in zip(entries, roots, strict=True)]
    return adapter_id_of_roots(described, config)


def adapter_id_of_roots(described: Sequence[tuple[str, str, tuple[int, ...], str]], config: Mapping[str, Any]) -> str:
    """`adapter_id` for whoever hashed the tensors already.

    Args:
        described: (normal name, dtype, shape, tree hash v1 of the bytes) of every tensor, in the order of the names.
        config: As for `adapter_id`.

    Raises:
        IdentityError: A setting has no exact spelling.
    """
    tensors = [[name, dtype.upper(), list(shape), root] for name, dtype, shape, root in described]
    return canonical.digest({"schema": ADAPTER_SCHEMA, "config": arithmetic_config(config), "tensors": tensors})


def normal_name(name: str) -> str:
    """Tensor name without the wrapper prefixes and the adapter's own name that PEFT writes or drops depending on its version."""
    name = name.removeprefix("base_model.model.")
    for marker in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
        head, found, tail = name.partition(f".{marker}.")
        if found:
            return f"{head}.{marker}.{tail.rpartition('.')[2]}"
    return name


def arithmetic_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an adapter_config.json that change the arithmetic, defaults filled in, without floats.

    Patterns become ordered pairs: PEFT takes the first pattern that matches, so their order is part of the arithmetic.
    """
    result: dict[str, Any] = {}
    for field, default in ARITHMETIC_FIELDS.items():
        value = config.get(field)
        result[field] = _exact(default if value is None else value, field)
    return result


def base_id(files: Mapping[str, Path], *, threads: int | None = None) -> str:
    """Content hash of a base model, 64 hex digits.

    Args:
        files: Every file that decides what the model computes, by a name that does not depend on where it is stored:
            weights, config.json, tokenizer.json.
        threads: Threads that hash; None is one for each core, at most 8.

    Raises:
        IdentityError: No file was given. OSError: A file cannot be read.
    """
    if not files:
        raise IdentityError("a base model without files has no identity")
    roots = [[name, tree_hash_file(files[name], threads=threads)] for name in sorted(files)]
    return hashlib.sha256(canonical.dumps({"schema": BASE_SCHEMA, "files": roots})).hexdigest()


def _exact(value: Any, field: str) -> Any:
    """`value` without floats: 16.0 is 16 and 0.5 is the string "0.5", so that a re-saved file keeps its identity."""
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise IdentityError(f"adapter_config.json has {field} = {value}; it must be a finite number")
        return int(value) if value.is_integer() else format(Decimal(repr(value)).normalize(), "f")
    if isinstance(value, Mapping):
        return [[str(key), _exact(item, field)] for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_exact(item, field) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    raise IdentityError(f"adapter_config.json has {field} of type {type(value).__name__}; it must be plain JSON")
