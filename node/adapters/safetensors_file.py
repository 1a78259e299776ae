"""A safetensors file, read with nothing trusted: every number of the header is checked before anything is allocated for it.

The header is 8 bytes of little-endian length, then that many bytes of JSON: name -> {dtype, shape, data_offsets}. The format's
own rules (https://huggingface.co/docs/safetensors) are kept, and tightened: floats only, no empty tensors, no holes.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from node.adapters.regular_file import open_regular, read_exactly
from node.adapters.strict_json import parse_strict
from node.errors import AdapterInvalidError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 8
MAX_SIZE = 2**63 - 1
# Bounds what the JSON parser can build from a header of legal size: 16 MiB of "[],[],..." would become 300 MB of objects.
MAX_STRUCTURE_CHARACTERS = 1_000_000
# bfloat16 has no numpy type: its bits are handed out as uint16, and whoever computes widens them.
NUMPY_TYPES: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the file. `offset` is absolute in the file; it and `size_bytes` are in bytes."""

    name: str
    dtype: str  # "F32", "F16" or "BF16"
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class SafetensorsFile:
    """An open safetensors file whose header has been checked. Reads are positional, so threads may share it.

    Attributes:
        entries: Every tensor by name, in file order.
        size_bytes: Length of the whole file.
    """

    def __init__(self, descriptor: int, name: str, size_bytes: int, entries: dict[str, TensorEntry]) -> None:
        self._descriptor = descriptor
        self._name = name
        self.size_bytes = size_bytes
        self.entries = entries

    @classmethod
    def open(cls, path: Path, max_bytes: int) -> Self:
        """Open and check `path`.

        Args:
            path: A regular file; symbolic links, FIFOs and devices are refused without being read.
            max_bytes: Limit on the file's length.

        Raises:
            AdapterInvalidError: adapter_format_unsupported (no such file), adapter_corrupt, adapter_header_too_large,
                adapter_too_many_tensors, adapter_dtype, adapter_too_large. The message names the file, never its folder.
        """
        descriptor, size_bytes = open_regular(path, max_bytes)
        try:
            return cls(descriptor, path.name, size_bytes, _read_header(descriptor, path.name, size_bytes))
        except BaseException:
            os.close(descriptor)
            raise

    def read(self, name: str) -> npt.NDArray[Any]:
        """One tensor as a new array of its shape: float32, float16, or uint16 holding the bits of bfloat16."""
        entry = self.entries[name]
        return np.frombuffer(self.read_bytes(name), dtype=NUMPY_TYPES[entry.dtype]).reshape(entry.shape)

    def read_bytes(self, name: str) -> bytes:
        """The raw little-endian bytes of one tensor."""
        entry = self.entries[name]
        return self.read_span(entry.offset, entry.size_bytes)

    def read_span(self, offset: int, size_bytes: int) -> bytes:
        """Exactly `size_bytes` from `offset`, which must lie inside the file as it was when opened.

        Raises:
            AdapterInvalidError: The file is shorter than it was when opened.
        """
        return read_exactly(self._descriptor, self._name, offset, size_bytes)

    def close(self) -> None:
        """Close the file. The arrays handed out stay valid."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _read_header(descriptor: int, name: str, file_bytes: int) -> dict[str, TensorEntry]:
    if file_bytes < LENGTH_BYTES:
        raise AdapterInvalidError(f"{name} is too short to be a safetensors file ({file_bytes} < {LENGTH_BYTES} bytes)")
    header_bytes = int.from_bytes(read_exactly(descriptor, name, 0, LENGTH_BYTES), "little")
    data_start = LENGTH_BYTES + header_bytes
    if data_start > file_bytes:
        raise AdapterInvalidError(
            f"{name}: header length {header_bytes:#x} exceeds the file's {file_bytes} bytes; it is not a safetensors file"
        )
    if header_bytes > MAX_HEADER_BYTES:
        raise AdapterInvalidError(
            f"{name}: header of {header_bytes} bytes; the limit is {MAX_HEADER_BYTES}", code="adapter_header_too_large"
        )
    described = _parse_header(read_exactly(descriptor, name, LENGTH_BYTES, header_bytes), name)
    entries = [_entry(tensor, value, name, data_start, file_bytes) for tensor, value in described.items()]
    entries.sort(key=lambda entry: entry.offset)
    _check_cover(entries, name, data_start, file_bytes)
    return {entry.name: entry for entry in entries}


def _parse_header(raw: bytes, name: str) -> dict[str, Any]:
    """The header as a dictionary of tensors, `__metadata__` removed."""
    # Counting is cheap and comes before parsing, which is not.
    tensor_count = raw.count(b'"data_offsets"')
    if tensor_count > MAX_TENSORS:
        raise AdapterInvalidError(
            f"{name} describes {tensor_count} tensors; the limit is {MAX_TENSORS}", code="adapter_too_many_tensors"
        )
    if sum(map(raw.count, (b"[", b"{", b","))) > MAX_STRUCTURE_CHARACTERS:
        raise AdapterInvalidError(
            f"{name}: the header has more than {MAX_STRUCTURE_CHARACTERS} brackets and commas", code="adapter_header_too_large"
        )
    header = parse_strict(raw, f"{name}: the header", "adapter_corrupt")
    if not isinstance(header, dict):
        raise AdapterInvalidError(f"{name}: the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterInvalidError(f"{name}: __metadata__ is not an object of strings")
    if not header:
        raise AdapterInvalidError(f"{name} holds no tensors")
    if len(header) > MAX_TENSORS:
        raise AdapterInvalidError(
            f"{name} describes {len(header)} tensors; the limit is {MAX_TENSORS}", code="adapter_too_many_tensors"
        )
    return header


def _entry(tensor: str, value: Any, file_name: str, data_start: int, file_bytes: int) -> TensorEntry:
    where = f"{file_name}: tensor {tensor[:200]!r}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterInvalidError(f"{where} is not described by exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NUMPY_TYPES:
        raise AdapterInvalidError(
            f"{where} has dtype {str(dtype)[:40]!r}; LoRA weights are {', '.join(NUMPY_TYPES)}", code="adapter_dtype"
        )
    if not _is_list_of_integers(shape) or len(shape) > MAX_DIMENSIONS or not all(1 <= size <= MAX_SIZE for size in shape):
        raise AdapterInvalidError(f"{where} has shape {str(shape)[:80]}; up to {MAX_DIMENSIONS} positive sizes are allowed")
    if not _is_list_of_integers(offsets) or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] <= MAX_SIZE:
        raise AdapterInvalidError(f"{where} has data_offsets {str(offsets)[:80]}; a begin and an end are needed")
    begin, end = offsets
    if data_start + end > file_bytes:
        raise AdapterInvalidError(f"{where} ends at data byte {end}, but the file has {file_bytes - data_start}")
    # Python integers do not overflow, so the product is the true one whatever the sizes claim.
    needed = math.prod(shape) * np.dtype(NUMPY_TYPES[dtype]).itemsize
    if needed != end - begin:
        raise AdapterInvalidError(f"{where}: shape {shape} of {dtype} needs {needed} bytes, data_offsets span {end - begin}")
    return TensorEntry(tensor, dtype, tuple(shape), data_start + begin, end - begin)


def _is_list_of_integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _check_cover(entries: list[TensorEntry], name: str, data_start: int, file_bytes: int) -> None:
    """The tensors, in offset order, cover the data exactly: no byte is read twice and none is left for smuggling."""
    position = data_start
    for entry in entries:
        if entry.offset != position:
            fault = "overlaps the tensor before it" if entry.offset < position else "leaves a hole before it"
            raise AdapterInvalidError(f"{name}: tensor {entry.name[:200]!r} {fault} (data byte {entry.offset - data_start})")
        position += entry.size_bytes
    if position != file_bytes:
        raise AdapterInvalidError(f"{name}: {file_bytes - position} bytes after the last tensor belong to none")
