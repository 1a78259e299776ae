"""One array on a GPU for keys, values and adapter pages, so that the border between them can move (`node.engine.border`).

Shape letters: U units, n blocks of a unit, L layers, B tokens of a block, G key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from node.errors import ConfigError
from node.kernels.layout import PageLayout
from node.models.inputs import KVCache
from node.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class UnitShape:
    """How units are cut: a block holds B tokens of all layers, a unit as many blocks as one adapter page takes.

    Attributes:
        block_elements: 2 L B G D. unit_blocks: n.
    """

    block_elements: int
    unit_blocks: int

    @classmethod
    def of(cls, spec: ModelSpec, layout: PageLayout, block_size: int) -> UnitShape:
        block_elements = 2 * spec.layer_count * block_size * spec.kv_size
        return cls(block_elements, -(-layout.page_elements // block_elements))

    @property
    def unit_elements(self) -> int:
        return self.block_elements * self.unit_blocks


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The array, and where the border begins.

    Attributes:
        array: [U, unit elements]. Zeros at first: a kernel may read a block past a sequence's end.
        shape: Of a unit.
        kv_units: Units 0 .. kv_units - 1 are blocks at first, the others are pages.
    """

    array: Tensor
    shape: UnitShape
    kv_units: int

    @property
    def kv_block_count(self) -> int:
        """Blocks at first."""
        return self.kv_units * self.shape.unit_blocks

    def kv_cache(self, spec: ModelSpec, block_size: int) -> KVCache:
        """Keys and values over the whole array, pages included: a view of [U n, B, G, D] a layer, a block's bytes apart."""
        whole = self.array.view(-1, spec.layer_count, 2, block_size, spec.kv_head_count, spec.head_dim)
        keys, values = ([whole[:, layer, part].transpose(1, 2) for layer in range(spec.layer_count)] for part in range(2))
        return KVCache(keys, values, block_size)


def allocate_memory(
    spec: ModelSpec,
    layout: PageLayout,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kv_bytes: int,
    adapter_bytes: int,
) -> DeviceMemory:
    """Allocate everything now.

    Raises:
        ConfigError: One side does not get a unit.
    """
    shape = UnitShape.of(spec, layout, block_size)
    unit_bytes = shape.unit_elements * dtype.itemsize
    kv_units, page_units = kv_bytes // unit_bytes, adapter_bytes // unit_bytes
    for name, count, size in (("keys and values", kv_units, kv_bytes), ("adapters", page_units, adapter_bytes)):
        if count < 1:
            raise ConfigError(
                f"{size} bytes are left for {name} and a unit of this model's memory takes {unit_bytes}; "
                "set engine.kv_cache_bytes and adapters.memory_bytes, or choose a smaller model"
            )
    array = torch.zeros((kv_units + page_units, shape.unit_elements), dtype=dtype, device=device)
    return DeviceMemory(array, shape, kv_units)
