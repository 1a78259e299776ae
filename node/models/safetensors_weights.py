"""HF safetensors checkpoints: one file, or shards listed by an index."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from node.errors import ModelLoadError

_HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit
_FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor's bytes lie: `offset` in bytes from the beginning of `file`, elements of `dtype` in row-major order."""

    file: Path
    offset: int
    dtype: torch.dtype


class SafetensorsWeights:
    """Named tensors over one or more safetensors files.

    Headers are checked here before the library maps a file, so that a file cut short is reported with its sizes.

    Raises:
        ModelLoadError: model_corrupt for a damaged or truncated file, model_unsupported for tensors that are no floats.
    """

    def __init__(self, files: tuple[Path, ...]) -> None:
        self._files: dict[str, Path] = {}
        self._extents: dict[str, Extent] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            start = data_start(file)
            for name, entry in read_header(file).items():
                if name == "__metadata__":
                    continue
                if name in self._files:
                    raise _corrupt(f"tensor {name} is in both {self._files[name]} and {file}")
                if entry["dtype"] not in _FLOAT_DTYPES:
                    raise ModelLoadError(
                        f"tensor {name} in {file} is {entry['dtype']}; supported are {', '.join(_FLOAT_DTYPES)}; "
                        "use the model's unquantised checkpoint"
                    )
                self._files[name] = file
                self._shapes[name] = tuple(entry["shape"])
                self._extents[name] = Extent(file, start + int(entry["data_offsets"][0]), _FLOAT_DTYPES[entry["dtype"]])
        self._names = frozenset(self._files)

    def names(self) -> frozenset[str]:
        """Every tensor of every shard."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape its header states."""
        return self._shapes[name]

    def extent(self, name: str) -> Extent:
        """Where its bytes lie, for whoever reads them without this class."""
        return self._extents[name]

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Copy one tensor out. The file is mapped for this call only: pages of a mapping count as the process's memory."""
        file = self._files[name]
        try:
            with safe_open(str(file), framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(name)
                return tensor.to(dtype, copy=True).contiguous()
        except (SafetensorError, OSError) as error:
            raise _corrupt(f"tensor {name} cannot be read from {file}") from error


def data_start(file: Path) -> int:
    """Offset of the first tensor's bytes.

    Raises:
        ModelLoadError: model_corrupt. The file cannot be read.
    """
    try:
        with file.open("rb") as handle:
            prefix = handle.read(8)
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read; check that it exists and its permissions", code="model_corrupt") from error
    if len(prefix) != 8:
        raise _corrupt(f"{file} has {len(prefix)} bytes: it is cut short or no safetensors file")
    return 8 + int(struct.unpack("<Q", prefix)[0])


def read_header(file: Path) -> dict[str, Any]:
    """Read and check the header of a safetensors file.

    Raises:
        ModelLoadError: model_corrupt. Not a safetensors file, or shorter or longer than its header says.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            prefix = handle.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= header_bytes <= min(_HEADER_LIMIT_BYTES, size - 8):
                raise _corrupt(
                    f"{file} has {size} bytes and states a header of {header_bytes}: it is cut short or no safetensors file"
                )
            header = json.loads(handle.read(header_bytes))
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + header_bytes + max(ends, default=0)
        if not all(
            isinstance(entry["shape"], list) and entry["dtype"] for name, entry in header.items() if name != "__metadata__"
        ):
            raise _corrupt(f"{file} has a header without shapes")
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read; check that it exists and its permissions", code="model_corrupt") from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise _corrupt(f"the header of {file} is not a safetensors header") from error
    if size != expected:
        raise _corrupt(f"{file} has {size} bytes and its header calls for {expected}")
    return dict(header)


def _corrupt(what: str) -> ModelLoadError:
    return ModelLoadError(f"{what}; download the model again", code="model_corrupt")
