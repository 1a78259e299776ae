"""From a directory of files to an adapter that may be served: checked, bound to the base, hashed.

One verifier serves all threads. A directory whose files have not changed (device, inode, size, time of change) is not read again.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attribution import identity
from attribution.errors import IdentityError, ManifestError
from attribution.manifest import MAX_BYTES as MAX_MANIFEST_BYTES
from attribution.manifest import Manifest
from node.adapters.binding import Binding, LinearTable, bind
from node.adapters.formats.layout import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, locate, refuse_code
from node.adapters.formats.opening import TensorFile, open_adapter
from node.adapters.linear_table import EMBEDDING
from node.adapters.regular_file import read_whole
from node.adapters.safetensors_file import TensorEntry
from node.errors import AdapterInvalidError

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE)
HASH_THREADS = 2  # verification shares the machine with the engine
MAX_REMEMBERED = 4096
# Pages may be bfloat16: no number of an adapter may become infinite there.
_WITHOUT_SIGN, _ROUNDS_TO_INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F7F8000)
_INFINITE_BF16 = np.uint16(0x7F80)  # all exponent bits: infinity or not a number

Fingerprint = tuple[tuple[int, int, int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many layers of one kind of linear module an adapter changes, for example 30 of 30."""

    module: str  # "model.layers.{layer}.self_attn.q_proj"
    adapted_count: int
    base_count: int


@dataclass(frozen=True, slots=True)
class VerifiedAdapter:
    """An adapter that may be served. `rank` is its largest; `size_bytes` the length of its weights file.

    `has_side` says that it is more than factors of linear modules (DoRA, biases of lora_B, the embedding): only an exact sum of
    adapters can hold it, no other merge.
    """

    adapter_id: str
    directory: Path
    rank: int
    coverage: tuple[Coverage, ...]
    size_bytes: int
    manifest: Manifest | None
    manifest_hash: str | None
    has_side: bool = False


class AdapterVerifier:
    """Verifies directories against one base model. Safe to call from several threads.

    Args:
        table: The base's linear modules.
        base_id: The base's content hash.
        max_rank: Limit on the rank of any module.
        max_bytes: Limit on the weights file.
    """

    def __init__(self, table: LinearTable, base_id: str, *, max_rank: int, max_bytes: int) -> None:
        self._table = table
        self._base_id = base_id
        self._max_rank = max_rank
        self._max_bytes = max_bytes
        self._remembered: OrderedDict[tuple[Path, Fingerprint], VerifiedAdapter] = OrderedDict()
        self._lock = threading.Lock()

    def verify(self, directory: Path) -> VerifiedAdapter:
        """Check everything about the adapter in `directory` (two files, and manifest.json where it has one).

        Raises:
            AdapterInvalidError: With the code of what is wrong; the message names the file, tensor or module.
        """
        key = (directory, fingerprint(directory))
        with self._lock:
            if key in self._remembered:
                self._remembered.move_to_end(key)
                return self._remembered[key]
        verified = self._verify(directory)
        if fingerprint(directory) != key[1]:
            raise AdapterInvalidError("the adapter's files changed while they were read; try again when they are complete")
        with self._lock:
            self._remembered[key] = verified
            while len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return verified

    def _verify(self, directory: Path) -> VerifiedAdapter:
        refuse_code(directory)
        with open_adapter(directory, self._table.shapes, max_rank=self._max_rank, max_bytes=self._max_bytes) as adapter:
            bound = bind(adapter.file.entries, adapter.config, self._table)
            tensors = [_hashable(adapter.file, entry) for entry in adapter.file.entries.values()]
            try:
                adapter_id = identity.adapter_id(tensors, adapter.config.raw, threads=HASH_THREADS)
            except IdentityError as error:
                raise AdapterInvalidError(f"{CONFIG_FILE}: {error}", code="adapter_config_invalid") from error
            size_bytes = adapter.file.size_bytes
        manifest = self._read_manifest(directory, adapter_id)
        return VerifiedAdapter(
            adapter_id=adapter_id,
            directory=directory,
            rank=bound.rank,
            coverage=_coverage(bound, self._table),
            size_bytes=size_bytes,
            manifest=manifest,
            manifest_hash=manifest.manifest_hash() if manifest is not None else None,
            has_side=bound.embedding is not None or any(module.needs_side for module in bound.modules),
        )

    def _read_manifest(self, directory: Path, adapter_id: str) -> Manifest | None:
        """The manifest, which must speak of exactly these weights on exactly this base; None where the adapter has none."""
        if not os.path.lexists(directory / MANIFEST_FILE):
            return None
        code = "adapter_manifest_invalid"
        try:
            manifest = Manifest.parse(read_whole(directory / MANIFEST_FILE, MAX_MANIFEST_BYTES, code))
        except ManifestError as error:
            raise AdapterInvalidError(f"{MANIFEST_FILE}: {error}", code=code) from error
        if manifest.adapter_id != adapter_id:
            raise AdapterInvalidError(
                f"{MANIFEST_FILE} is of adapter {manifest.adapter_id}, the files are adapter {adapter_id}; write it again",
                code=code,
            )
        if manifest.base_id != self._base_id:
            raise AdapterInvalidError(
                f"{MANIFEST_FILE} says the adapter was trained on base {manifest.base_id}; this node serves base {self._base_id}",
                code="adapter_base_mismatch",
            )
        return manifest


def fingerprint(directory: Path) -> Fingerprint:
    """What changes when a file of the adapter is written or replaced; None stands for a file that is not there."""
    found = tuple(_file_fingerprint(directory / name) for name in ADAPTER_FILES)
    if found[1] is not None:
        return found
    try:
        layout = locate(directory)
    except (AdapterInvalidError, OSError):
        return found
    config = None if layout.config is None else _file_fingerprint(layout.config)
    return (*found, _file_fingerprint(layout.weights), config)


def _file_fingerprint(path: Path) -> tuple[int, int, int, int] | None:
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _hashable(weights: TensorFile, entry: TensorEntry) -> identity.TensorEntry:
    """A tensor as the content hash wants it. Looking for NaN happens in the same read, so each byte is fetched once."""

    def read() -> bytes:
        data = weights.read_bytes(entry.name)
        _refuse_nonfinite(data, entry)
        return data

    return identity.TensorEntry(entry.name, entry.dtype, entry.shape, read)


def _refuse_nonfinite(data: bytes, entry: TensorEntry) -> None:
    if entry.dtype == "BF16":
        is_finite = not ((np.frombuffer(data, np.uint16) & _INFINITE_BF16) == _INFINITE_BF16).any()
    elif entry.dtype == "F32":
        is_finite = not ((np.frombuffer(data, np.uint32) & _WITHOUT_SIGN) >= _ROUNDS_TO_INFINITY).any()
    else:
        is_finite = bool(np.isfinite(np.frombuffer(data, np.float16)).all())
    if not is_finite:
        raise AdapterInvalidError(
            f"tensor {entry.name!r} holds NaN, infinity or what bfloat16 rounds to it", code="adapter_nonfinite"
        )


def _coverage(bound: Binding, table: LinearTable) -> tuple[Coverage, ...]:
    adapted: dict[str, int] = {}
    for module in bound.modules:
        kind = table.shapes[module.name].name
        adapted[kind] = adapted.get(kind, 0) + 1
    base = {linear.name: linear.layer_count for linear in table.shapes.values()}
    embedding = () if bound.embedding is None else (Coverage(EMBEDDING, 1, 1),)
    return (*embedding, *(Coverage(kind, count, base[kind]) for kind, count in adapted.items()))
