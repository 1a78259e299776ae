"""Builds the LoRA work of steps, short ones with the compiled kernels: between two steps of a GPU the host has few milliseconds.

The sixty small calls of numpy took a step with a prompt 0.5 ms (two blocks), on a busy host of 2.1 GHz 1.2 to 1.7.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from node.kernels.lora_deal import is_long
from node.kernels.lora_long import LONG_STEP_ROWS
from node.kernels.lora_tiles import Ints, Recipe, TileBlock, build_tiles

SCRATCH_INTS = 1 << 18  # of a run that is built here; longer ones are numpy's


class _TileWork(ctypes.Structure):
    """`OpenloraTileWork` in csrc/host/tile_block.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("recipes", "counts", "term_counts", "slots", "weights", "slot_pages", "slot_ranks")
        ),
        *((name, ctypes.c_int64) for name in ("sequence_count", "recipe_count", "slot_count", "most_pages")),
        *((name, ctypes.c_int32) for name in ("tile_rows", "processors")),
    )


class TileBuilder:
    """`build_tiles` for one engine.

    Args:
        tile_rows: Rows a tile may have. processors: of the GPU.
        library: The compiled kernels; None builds everything with numpy.
    """

    def __init__(self, tile_rows: int, processors: int, library: Path | None) -> None:
        self._tile_rows, self._processors = tile_rows, processors
        self._scratch = np.empty(SCRATCH_INTS, np.int32)
        self._cut: Any = None
        if library is not None:
            self._cut = ctypes.CDLL(str(library)).openlora_tile_block
            self._cut.restype = ctypes.c_int64
            self._cut.argtypes = (ctypes.POINTER(_TileWork), ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)

    def build(self, recipes: Sequence[Recipe], counts: Sequence[int], slot_pages: Ints, slot_ranks: Ints) -> TileBlock:
        """See `build_tiles`, whose run this is to the last bit. slot_pages, slot_ranks: contiguous int32.

        Raises:
            ValueError: As `build_tiles` says.
        """
        rows = sum(counts)
        if self._cut is not None and rows <= LONG_STEP_ROWS and not is_long(rows, self._processors):
            found = self._build_short(recipes, counts, slot_pages, slot_ranks)
            if found is not None:
                return found
        return build_tiles(recipes, counts, slot_pages, self._tile_rows, processors=self._processors, slot_ranks=slot_ranks)

    def _build_short(
        self, recipes: Sequence[Recipe], counts: Sequence[int], slot_pages: Ints, slot_ranks: Ints
    ) -> TileBlock | None:
        """None where the compiled kernels leave the work to numpy."""
        numbers: dict[tuple[tuple[int, float], ...], int] = {}
        pairs = zip(map(tuple, recipes), counts, strict=True)
        number = [numbers.setdefault(recipe, len(numbers)) if count else -1 for recipe, count in pairs]
        ints = np.array([*number, *counts, *map(len, numbers), *(slot for recipe in numbers for slot, _ in recipe)], np.int32)
        weights = np.array([weight for recipe in numbers for _, weight in recipe], np.float32)
        sequence_count, at = len(number), ints.ctypes.data
        work = _TileWork(
            *(at, at + 4 * sequence_count, at + 8 * sequence_count, at + 4 * (2 * sequence_count + len(numbers))),
            *(weights.ctypes.data, slot_pages.ctypes.data, slot_ranks.ctypes.data),
            *(sequence_count, len(numbers), *slot_pages.shape),
            *(self._tile_rows, self._processors),
        )
        made = np.empty(3, np.int64)
        size = self._cut(ctypes.byref(work), self._scratch.ctypes.data, len(self._scratch), made.ctypes.data)
        if size == 0:
            return None
        tile_count, item_count, pair_count = made.tolist()
        return TileBlock(self._scratch[:size].copy(), tile_count, item_count, pair_count)
