"""Writes an adapter of any format into its pages with numpy, and hashes the very bytes it writes.

The way of everything that `node.adapters.page_reader` does not read: GGUF, DoRA and whatever else needs tensors beside the pages,
and a machine without compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attribution import identity
from node.adapters.binding import Binding, BoundModule, LinearTable
from node.adapters.formats.opening import TensorFile, open_adapter
from node.adapters.safetensors_file import TensorEntry
from node.adapters.side import BaseWeights, SideBuilder
from node.errors import AdapterChangedError
from node.kernels.layout import ModuleSpan, PageLayout
from node.kernels.lora import SideTensors

Page = npt.NDArray[Any]  # [page_elements] float32, or uint16 holding the bits of bfloat16
Writer = Callable[[npt.NDArray[Any], str], None]


class PageFiller:
    """Fills pages, one tensor after the other on the calling thread.

    Args:
        layout: The model's pages. table: the model's linear modules.
        max_rank: Limit on ranks. max_bytes: limit on an adapter's file.
        base: The base's weights, for DoRA and adapters of the embedding; None refuses those.
    """

    def __init__(
        self, layout: PageLayout, table: LinearTable, *, max_rank: int, max_bytes: int, base: BaseWeights | None = None
    ) -> None:
        self._layout = layout
        self._table = table
        self._max_rank = max_rank
        self._max_bytes = max_bytes
        self._base = base

    def fill(self, directory: Path, binding: Binding, pages: Sequence[Page]) -> tuple[str, Callable[[], SideTensors | None]]:
        """Write an adapter into `pages`, which nobody else touches meanwhile.

        Args:
            directory: Of the adapter. binding: as its header said.
            pages: Enough for the binding's rank, in rank order.

        Returns:
            The content hash of what was read, and what computes the tensors beside the pages: to be called when that hash is
            the one that was asked for, because it completes the pages of DoRA's modules.

        Raises:
            AdapterError: The files are not those the binding was made of, or can no longer be read as an adapter.
            IdentityError, OSError: They can no longer be hashed or read.
        """
        is_float = not pages or pages[0].dtype == np.float32
        side = SideBuilder(binding, self._layout, self._base, torch.float32 if is_float else torch.bfloat16)
        with open_adapter(directory, self._table.shapes, max_rank=self._max_rank, max_bytes=self._max_bytes) as adapter:
            writers = _writers(binding, self._layout, pages)
            tensors = [_hashed(adapter.file, entry, writers, side) for entry in adapter.file.entries.values()]
            found = identity.adapter_id(tensors, adapter.config.raw, threads=1)

        def write_b(module: BoundModule, values: npt.NDArray[np.float32]) -> None:
            _matrix_writer(pages, self._layout.page_rank, self._layout.spans[module.name], is_b=True)(values, "F32")

        return found, lambda: side.finish(write_b)


def _writers(binding: Binding, layout: PageLayout, pages: Sequence[Page]) -> dict[str, list[Writer]]:
    """For every tensor of the file that pages hold, the functions that write it; one tensor may serve several fused modules."""
    writers: dict[str, list[Writer]] = {}
    for module in binding.modules:
        span = layout.spans[module.name]
        writers.setdefault(module.a_tensor, []).append(_matrix_writer(pages, layout.page_rank, span, is_b=False))
        if module.magnitude_tensor is None:  # DoRA's B is written when its gain is known
            write = _matrix_writer(pages, layout.page_rank, span, is_b=True, first_row=module.first_row)
            writers.setdefault(module.b_tensor, []).append(write)
    return writers


def _matrix_writer(pages: Sequence[Page], page_rank: int, span: ModuleSpan, *, is_b: bool, first_row: int = 0) -> Writer:
    offset, width = (span.b_offset, span.out_features) if is_b else (span.a_offset, span.in_features)

    def write(values: npt.NDArray[Any], dtype: str) -> None:
        part_of_b = values[first_row : first_row + width] if is_b else values
        rows = convert(part_of_b, dtype, pages[0].dtype)
        rows = rows.T if is_b else rows  # pages are rank-major; the file has B as [out_features, rank]
        for index, page in enumerate(pages):
            part = rows[index * page_rank : (index + 1) * page_rank]
            page[offset : offset + part.shape[0] * width].reshape(part.shape)[...] = part

    return write


def _hashed(file: TensorFile, entry: TensorEntry, writers: dict[str, list[Writer]], side: SideBuilder) -> identity.TensorEntry:
    """A tensor that is written into its pages when it is read for the hash, so that each byte is fetched once."""

    def read() -> bytes:
        values = file.read(entry.name)
        if entry.name not in writers and not side.wants(entry.name):
            raise AdapterChangedError(f"tensor {entry.name[:200]!r} is new; the adapter's files changed after they were verified")
        for write in writers.get(entry.name, ()):
            write(values, entry.dtype)
        if side.wants(entry.name):
            side.take(entry.name, values)
        return values.tobytes()

    return identity.TensorEntry(entry.name, entry.dtype, entry.shape, read)


def convert(values: npt.NDArray[Any], dtype: str, target: np.dtype[Any]) -> npt.NDArray[Any]:
    """Convert file values to page values.

    Args:
        values: As `SafetensorsFile.read` gives them. dtype: "F32", "F16" or "BF16".
        target: float32, or uint16 for the bits of bfloat16 (rounded to nearest even, as torch does).
    """
    if target == np.uint16:
        return values if dtype == "BF16" else to_bfloat16_bits(values.astype(np.float32, copy=False))
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def to_bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of finite float32 values rounded to bfloat16, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (rounded >> np.uint32(16)).astype(np.uint16)
