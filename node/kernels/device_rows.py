"""Which adapters each row of a GPU's step uses: tiles on the device, and the little that the host must know of them."""

from __future__ import annotations

from dataclasses import dataclass

from node.kernels.cuda_ops import DeviceTiles

SHORT_ROWS = 128  # of the longest step for which it makes a difference how many pages its rows use
MANY_ITEMS = 40  # (tile, page) pairs; measured on an H100 (csrc/README.md)


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """The rows of a step and their adapters.

    Attributes:
        tiles: What the kernels read.
        pair_count: (row, page) pairs that the tiles may have; sizes what a shrink writes, so it is fixed in a graph.
        has_many: What `has_many_pages` says of the tiles; fixed in a graph too.
        has_head: Whether an adapter of these rows changes the output projection.
        wanted: The same for the rows that want logits, where those are not all; None where they use no adapter.
    """

    tiles: DeviceTiles
    pair_count: int
    has_many: bool = False
    has_head: bool = False
    wanted: DeviceRows | None = None


def has_many_pages(rows: int, items: int) -> bool:
    """Whether the pages of a step are so many that its linears had better read them before their weights.

    Args:
        rows: Of the step. items: `TileBlock.item_count`.
    """
    return rows <= SHORT_ROWS and items > MANY_ITEMS
