"""The GGUF container, versions 2 and 3: metadata and tensor directory, and one tensor's numbers at a time.

The header is parsed here and not with the `gguf` package's reader, which builds a numpy view for every token and merge: on
SmolLM2-135M that takes 2.1 s and 170 MB (measured, AMD EPYC), this takes 0.1 s and 20 MB. Every length is checked against the
file's size before anything is allocated. Dequantising is the `gguf` package's.

Source: the GGUF specification of the ggml project.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Self

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from node.errors import ModelLoadError

if TYPE_CHECKING:  # the API process reads the headers of adapters here, and imports no torch
    import torch
    from torch import Tensor

QUANTISATIONS: Final = frozenset(
    ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
)  # what `gguf` dequantises exactly as llama.cpp does and people publish
_SCALARS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TYPES: Final = {int(item): item for item in GGMLQuantizationType}
_STRING, _ARRAY = 8, 9
_ENTRY_LIMIT = 1 << 20  # metadata keys or tensors; real files have a few hundred
_DEPTH_LIMIT = 4  # arrays inside arrays
_CHUNK_ELEMENTS = 1 << 18  # dequantised at once: 1 MiB of float32, a few of temporaries


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of the directory. `shape` is in torch's order; `offset` and `size_bytes` locate its data in the file."""

    name: str
    shape: tuple[int, ...]
    quantisation: GGMLQuantizationType
    offset: int
    size_bytes: int


class GgufFile:
    """A parsed GGUF file. It holds no open handle: each read opens the file and reads only what it needs.

    Attributes:
        path: The file.
        metadata: Values by key; arrays are lists.
        tensors: Directory entries by name.

    Raises:
        ModelLoadError: model_corrupt for damaged or truncated files, model_unsupported for versions and quantisations.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._parse(file, path.stat().st_size)
        except OSError as error:
            raise ModelLoadError(
                f"{path} cannot be read; check that it exists and its permissions", code="model_corrupt"
            ) from error

    @classmethod
    def from_descriptor(cls, descriptor: int, name: str, *, header_limit_bytes: int) -> Self:
        """Parse the header of an open file, which stays open and belongs to the caller; `read` is not for such a file.

        Args:
            name: How messages call the file.
            header_limit_bytes: Metadata and directory may not be longer; what they build in memory is a multiple of it.

        Raises:
            ModelLoadError: As for a path.
        """
        parsed = cls.__new__(cls)
        parsed.path = Path(name)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(0)
            parsed._parse(file, os.fstat(descriptor).st_size, header_limit_bytes)
        return parsed

    def _parse(self, file: BinaryIO, size_bytes: int, limit_bytes: int | None = None) -> None:
        try:
            self.metadata, self.tensors = _Header(self.path, file, size_bytes, limit_bytes).parse()
        except (struct.error, UnicodeDecodeError, ValueError, MemoryError) as error:
            raise ModelLoadError(
                f"the header of {self.path} is not a GGUF header; download the model again", code="model_corrupt"
            ) from error

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Dequantise one tensor into a new contiguous CPU tensor of `dtype`, a few megabytes at a time.

        Raises:
            ModelLoadError: model_corrupt. The file changed while it was read.
        """
        import torch  # see the top of the file

        tensor = self.tensors[name]
        result = torch.empty(tensor.shape, dtype=dtype)
        rows = result.view(-1, tensor.shape[-1])
        row_bytes = tensor.size_bytes // rows.shape[0]
        step = max(1, _CHUNK_ELEMENTS // rows.shape[1])
        with self.path.open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            for start in range(0, rows.shape[0], step):
                chunk = rows[start : start + step]
                raw = np.fromfile(file, dtype=np.uint8, count=chunk.shape[0] * row_bytes)
                if raw.size != chunk.shape[0] * row_bytes:
                    raise _corrupt(f"{self.path} ended inside tensor {name}")
                numbers = dequantize(raw.reshape(chunk.shape[0], row_bytes), tensor.quantisation)
                chunk.copy_(torch.from_numpy(numbers))
        return result


class _Header:
    """Reads the header front to back; `_take` refuses any length that the file, or the limit on headers, cannot hold."""

    def __init__(self, path: Path, file: BinaryIO, size_bytes: int, limit_bytes: int | None) -> None:
        self._path = path
        self._file = file
        self._size = size_bytes
        self._left = size_bytes if limit_bytes is None else min(size_bytes, limit_bytes)

    def parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self._size < 24 or self._take(4) != b"GGUF":
            raise _corrupt(f"{self._path} has {self._size} bytes and does not start as a GGUF file")
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ModelLoadError(
                f"{self._path} is GGUF version {version}; little-endian versions 2 and 3 are supported; convert it"
            )
        tensor_count, key_count = self._count("<Q"), self._count("<Q")
        metadata = {self._string(): self._value(self._scalar("<I"), 0) for _ in range(key_count)}
        directory = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise _corrupt(f"{self._path} states an alignment of {alignment!r}")
        start = -(-self._file.tell() // alignment) * alignment
        return metadata, self._located(directory, start)

    def _located(self, directory: list[GgufTensor], start: int) -> dict[str, GgufTensor]:
        """Make offsets absolute, and check that the file reaches the end of the last tensor."""
        tensors = {
            entry.name: GgufTensor(entry.name, entry.shape, entry.quantisation, start + entry.offset, entry.size_bytes)
            for entry in directory
        }
        expected = max((entry.offset + entry.size_bytes for entry in tensors.values()), default=start)
        if expected > self._size:
            raise _corrupt(f"{self._path} has {self._size} bytes and its directory calls for {expected}: it is cut short")
        return tensors

    def _tensor(self) -> GgufTensor:
        name = self._string()
        dimension_count = self._scalar("<I")
        if not 1 <= dimension_count <= 4:
            raise _corrupt(f"tensor {name} in {self._path} has {dimension_count} dimensions")
        shape = tuple(reversed([self._scalar("<Q") for _ in range(dimension_count)]))
        type_number, offset = self._scalar("<I"), self._scalar("<Q")
        quantisation = _TYPES.get(type_number)
        if quantisation is None or quantisation.name not in QUANTISATIONS:
            shown = quantisation.name if quantisation else type_number
            raise ModelLoadError(
                f"tensor {name} in {self._path} is stored as {shown}; supported are {', '.join(sorted(QUANTISATIONS))}; "
                "use another quantisation of the model"
            )
        block, block_bytes = GGML_QUANT_SIZES[quantisation]
        elements = math.prod(shape)
        if elements == 0 or shape[-1] % block:
            raise _corrupt(f"tensor {name} in {self._path} has shape {list(shape)}, not whole blocks of {block}")
        return GgufTensor(name, shape, quantisation, offset, elements // block * block_bytes)

    def _value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY and depth < _DEPTH_LIMIT:
            item_kind, count = self._scalar("<I"), self._scalar("<Q")
            return self._array(item_kind, count, depth + 1)
        if kind not in _SCALARS:
            raise _corrupt(f"{self._path} has a metadata value of unknown type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self, kind: int, count: int, depth: int) -> list[Any]:
        if kind in _SCALARS:
            layout = _SCALARS[kind]
            raw = self._take(count * struct.calcsize(layout))
            return list(struct.unpack(f"<{count}{layout[1]}", raw))
        self._check(count)  # an item has at least one byte
        return [self._value(kind, depth) for _ in range(count)]

    def _string(self) -> str:
        return self._take(self._scalar("<Q")).decode("utf-8")

    def _count(self, layout: str) -> int:
        count: int = self._scalar(layout)
        if count > _ENTRY_LIMIT:
            raise _corrupt(f"{self._path} states {count} entries; at most {_ENTRY_LIMIT} are read")
        return count

    def _scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _take(self, count: int) -> bytes:
        self._check(count)
        self._left -= count
        data = self._file.read(count)
        if len(data) != count:
            raise _corrupt(f"{self._path} has {self._size} bytes and ends inside its header")
        return data

    def _check(self, count: int) -> None:
        if count > self._left:
            raise _corrupt(
                f"{self._path} has {self._size} bytes, {self._left} of them left for its header, which states a value of {count}"
            )


def _corrupt(what: str) -> ModelLoadError:
    return ModelLoadError(f"{what}; download the model again", code="model_corrupt")
