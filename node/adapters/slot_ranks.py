"""What the host knows of the ranks in each slot, so that a step's kernels need not look them up."""

from __future__ import annotations

import numpy as np

from node.adapters.file_plan import FilePlan
from node.adapters.linear_table import HEAD
from node.kernels.layout import PageLayout


class SlotRanks:
    """One number a slot: the ranks of every module of every layer where all have the same, else 0.

    The output projection is left out: hardly an adapter changes it, and steps in which one does look ranks up.

    Args:
        layout: The order of modules in the rank table.
        slot_count: S.

    Attributes:
        values: [S] int32.
    """

    def __init__(self, layout: PageLayout, slot_count: int) -> None:
        self.values = np.zeros(slot_count, np.int32)
        self._ranks = np.zeros(layout.module_count, np.int32)
        self._layers = np.array([span.index for name, span in layout.spans.items() if name != HEAD], np.int64)

    def set(self, slot: int, file: FilePlan) -> None:
        """An adapter has this slot from now on."""
        self._ranks[:] = 0
        self._ranks[file.module_indices] = file.ranks
        ranks = self._ranks[self._layers]
        self.values[slot] = ranks[0] if len(ranks) and (ranks == ranks[0]).all() else 0

    def clear(self, slot: int) -> None:
        """Nobody has it."""
        self.values[slot] = 0
