"""The border between KV blocks and adapter pages of one GPU, which moves with what is asked for.

Both lie in one array of KV blocks. A block holds the keys and values of `block_size` tokens in all layers, layer after layer; a
unit is a run of as many blocks as one adapter page takes (11 of 8.4 MB for the 8B shape and pages of 88.1 MB: 4.5 % of a page's
unit is lost). Kernels see the keys and the values of a layer with the stride of a whole block between blocks, and the pages with
the stride of a unit, so moving the border moves no byte and changes no pointer: a CUDA graph does not notice.

Each side uses its own idle memory first: KV blocks that nobody holds (cached prefixes are forgotten), adapters that nobody runs
or wants (they stay in host memory, one copy away). Only then it takes the other's idle memory, a unit at a time. What runs is
never touched, so the first in line can always get all but what the others running before it hold.
"""

from __future__ import annotations

from typing import Protocol

from node.engine.blocks import BlockPool


class PageLender(Protocol):
    """Adapter pages, each of them one unit. `node.adapters.pool.AdapterPool` is one."""

    def take_page(self) -> int | None:
        """Give up an idle page; None when there is none."""
        ...

    def add_page(self, page: int) -> None:
        """One page more, whose blocks launched steps may still read."""


class Border:
    """Moves units.

    Args:
        blocks: The KV blocks. pages: the adapter pages; page p lies where blocks p * n .. p * n + n - 1 lie.
        unit_blocks: n, blocks of a unit.
    """

    def __init__(self, blocks: BlockPool, pages: PageLender, unit_blocks: int) -> None:
        self._blocks = blocks
        self._pages = pages
        self._unit_blocks = unit_blocks
        self.moved_to_blocks_total = 0
        self.moved_to_pages_total = 0

    def lend_blocks(self, count: int) -> None:
        """Turn idle adapter pages into at least `count` KV blocks, as far as there are any."""
        while count > 0 and (page := self._pages.take_page()) is not None:
            self._blocks.add(range(page * self._unit_blocks, (page + 1) * self._unit_blocks))
            self.moved_to_blocks_total += 1
            count -= self._unit_blocks

    def lend_pages(self, count: int) -> None:
        """Turn units of KV blocks that nobody holds into `count` adapter pages, while a quarter of all blocks stays free.

        Blocks are needed at once, by whoever runs; an adapter can wait.
        """
        for unit in self._blocks.idle_units(self._unit_blocks):
            if count <= 0 or 4 * (self._blocks.free_count - self._unit_blocks) < self._blocks.block_count:
                return
            if self._blocks.withdraw(range(unit * self._unit_blocks, (unit + 1) * self._unit_blocks)):
                self._pages.add_page(unit)
                self.moved_to_pages_total += 1
                count -= 1
