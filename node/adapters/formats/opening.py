"""One door to an adapter's files, whatever format they are in: a configuration and named tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from node.adapters.formats.gguf import GgufAdapterFile
from node.adapters.formats.layout import locate
from node.adapters.lora_config import LoraConfig, check_lora_config, read_lora_config
from node.adapters.safetensors_file import SafetensorsFile, TensorEntry
from node.request import LinearShape


class TensorFile(Protocol):
    """Named tensors of an open file. `entries` are in file order; reads may come from several threads."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]: ...

    @property
    def size_bytes(self) -> int: ...

    def read(self, name: str) -> npt.NDArray[Any]:
        """One tensor as an array of its shape: float32, float16, or uint16 holding the bits of bfloat16."""
        ...

    def read_bytes(self, name: str) -> bytes:
        """The little-endian bytes of one tensor."""
        ...


@dataclass(frozen=True, slots=True)
class OpenAdapter:
    """An adapter whose headers were read. `config.raw` and the names in `file.entries` are what its content hash covers."""

    config: LoraConfig
    file: TensorFile


@contextmanager
def open_adapter(directory: Path, linears: Mapping[str, LinearShape], *, max_rank: int, max_bytes: int) -> Iterator[OpenAdapter]:
    """Open the adapter in `directory`.

    Args:
        directory: PEFT's output, Ludwig's, or one GGUF file; see `layout`.
        linears: The base's linear modules by full name.
        max_rank: Limit on ranks. max_bytes: Limit on the weights file.

    Raises:
        AdapterInvalidError: With the code of what is wrong.
    """
    layout = locate(directory)
    if layout.config is None:
        with GgufAdapterFile.open(layout.weights, max_bytes, linears) as gguf:
            yield OpenAdapter(check_lora_config(gguf.config, max_rank), gguf)
        return
    config = read_lora_config(layout.config.parent, max_rank)
    with SafetensorsFile.open(layout.weights, max_bytes) as file:
        yield OpenAdapter(config, file)
