"""Which adapters each row of a GPU's step uses: tiles on the device, and the little that the host must know of them."""

from __future__ import annotations

from dataclasses import dataclass

from node.kernels.cuda_ops import DeviceTiles


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """The rows of a step and their adapters.

    Attributes:
        tiles: What the kernels read.
        pair_count: (row, page) pairs that the tiles may have; sizes what a shrink writes, so it is fixed in a graph.
        head: The same for the rows that want logits; None where no adapter of the step changes the output projection.
    """

    tiles: DeviceTiles
    pair_count: int
    head: DeviceRows | None = None
