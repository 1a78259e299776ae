"""Sequences that run, with the blocks and the adapters they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq

from node.adapters.residency import AdapterMemory
from node.engine.blocks import BlockPool
from node.engine.sequence import Sequence
from node.engine.shares import Shares


class Running:
    """In order of arrival; a sequence that gave its place back returns to where it was.

    Args:
        blocks: The KV blocks. adapters: adapter memory.
        place_count: The most sequences that run at once.
    """

    def __init__(self, blocks: BlockPool, adapters: AdapterMemory, place_count: int) -> None:
        self._blocks = blocks
        self._adapters = adapters
        self._place_count = place_count
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._sequences

    @property
    def has_place(self) -> bool:
        return len(self._sequences) < self._place_count

    @property
    def free_places(self) -> int:
        return self._place_count - len(self._sequences)

    @property
    def last(self) -> Sequence:
        """The latest arrival."""
        return self._sequences[-1]

    def after(self, sequence: Sequence | None = None) -> list[Sequence]:
        """`sequence` and those that arrived later; never the oldest of all, which nobody may push out."""
        first = 1 if sequence is None else max(1, self._sequences.index(sequence))
        return self._sequences[first:]

    def shares(self, weights: Mapping[str, int]) -> Shares:
        """What part of places and blocks each tenant holds at this moment."""
        return Shares(self._sequences, weights, self._place_count, self._blocks.block_count)

    # ---- coming and going

    def start(self, sequence: Sequence, matched: Seq[int]) -> None:
        """A sequence runs from now on, the blocks of its cached prefix in hand."""
        self._adapters.pin(sequence.terms)
        sequence.holds_adapters = True
        self._blocks.share(matched)
        sequence.blocks.extend(matched)
        sequence.published_count = len(matched)
        sequence.computed_count = len(matched) * self._blocks.block_size
        index = len(self._sequences)
        while index and self._sequences[index - 1].arrival_index > sequence.arrival_index:
            index -= 1
        self._sequences.insert(index, sequence)

    def stop(self, sequence: Sequence) -> None:
        """It runs no more; its blocks are free."""
        self._sequences.remove(sequence)
        self._blocks.release(sequence.blocks)
        del sequence.blocks[:]
        self._let_go(sequence)

    def let_go_of_adapters(self) -> None:
        """Sequences whose last token is being drawn need no adapters any more: somebody else's may come while it is."""
        for sequence in self._sequences:
            if sequence.is_ending:
                self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        if sequence.holds_adapters:
            self._adapters.unpin(sequence.terms)
            sequence.holds_adapters = False

    # ---- blocks

    def grow(self, sequence: Sequence, count: int) -> bool:
        """Hold enough blocks for `count` more rows; takes none when there are not enough."""
        missing = self._blocks.blocks_for(sequence.computed_count + count) - len(sequence.blocks)
        if not self._blocks.reserve(missing):
            return False
        for _ in range(missing):
            block = self._blocks.allocate()
            if block is None:
                raise RuntimeError("the block pool counted a free block it does not have")
            sequence.blocks.append(block)
        return True

    def room(self, sequence: Sequence) -> int:
        """Rows that fit into the sequence's own blocks and all free ones."""
        return (len(sequence.blocks) + self._blocks.free_count) * self._blocks.block_size - sequence.computed_count

    def owed_blocks(self) -> int:
        """Blocks that running prefills were promised and do not hold yet."""
        return sum(
            self._blocks.blocks_for(sequence.token_count) - len(sequence.blocks)
            for sequence in self._sequences
            if not sequence.is_ending
        )
