"""Cuts of the keys for the own decode kernels, made on the device once a step: see `triton_decode.plan_items_kernel`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from node.kernels.attention.paged import AttentionShape, DecodePlan
from node.kernels.attention.triton_decode import TILE, plan_items_kernel

_MOST_CHUNKS = 16  # of one sequence when the chunk is fixed; bounds the partial results
_LEAST_CHUNK = 4  # tiles: 256 keys
ITEM_HEADER = 8  # int32
_PLAN_PROGRAMS = 8


@dataclass(frozen=True, slots=True)
class ItemCost:
    """What a program costs besides its tiles, in tiles: until its first key arrives, and to join a sequence that was cut."""

    start_tiles: int = 2
    join_tiles: int = 1


@dataclass(slots=True)
class DecodeItems:
    """The plan kernel's output for one window.

    Attributes:
        items: [most items, 8 + cache blocks] int32: sequence, first key, key after the last, place of its partial result, items
            of the sequence, place of its first partial result (they lie one after another), the sequence's length, the row of q
            and of the result; then the item's first cache blocks, so that whoever takes it asks for keys after a single load.
            Of an item of several rows, whose last one is that of the last key: 0 for the places, minus the rows instead of the
            items of the sequence, the keys older than the step instead of the length, and its first row.
        counts: [1 + Q] int32: items in all, then those of each sequence's one row.
    """

    items: Tensor
    counts: Tensor


@dataclass(slots=True)
class ItemPlan(DecodePlan):
    """A plan with the items of every window the model has, and the programs to launch for each key/value head."""

    items: dict[int | None, DecodeItems]
    workers: int


class DecodeWork:
    """Plans items and owns the memory in which the programs of one sequence meet.

    Args:
        programs: Of one key/value head that run at once, at most. cost: What the device weighs when it chooses the cuts.
        is_deterministic: Cuts at multiples of a fixed chunk, whatever else is in the batch.
        item_blocks: Cache blocks that an item names, 0 or 24.
        chunk_rows: Most rows of a step with items of several rows.
        has_follow: Plan beside the kernel before (programmatic dependent launch); see `PagedAttention.plan_decode`.

    Attributes:
        partial: [most items, N, D] float32. stats: [most items, N, 2] float32. done: [max_batch, G] int32, 0 between launches.
        chunk_keys: Keys of a fixed chunk; 0 where the device chooses.
    """

    def __init__(
        self,
        shape: AttentionShape,
        device: torch.device,
        programs: int,
        *,
        is_deterministic: bool = False,
        cost: ItemCost | None = None,
        item_blocks: int = 0,
        chunk_rows: int = 0,
        has_follow: bool = False,
    ) -> None:
        self.shape = shape
        self._has_follow = has_follow
        self._chunk_rows = chunk_rows
        self._width = ITEM_HEADER + item_blocks
        self._cost = cost or ItemCost()
        self._rows = triton.next_power_of_2(shape.max_batch)  # one compilation for every batch
        self.programs = max(1, programs)
        longest = -(-shape.max_context // TILE)
        chunk = max(_LEAST_CHUNK, -(-longest // _MOST_CHUNKS)) if is_deterministic else 0
        self.chunk_keys = chunk * TILE
        most_of_one = -(-longest // chunk) if chunk else 1
        self.most_items = max(shape.max_batch * most_of_one, shape.max_batch + 8 * self.programs)
        self.partial = torch.empty((self.most_items, shape.heads, shape.head_dim), dtype=torch.float32, device=device)
        self.stats = torch.empty((self.most_items, shape.heads, 2), dtype=torch.float32, device=device)
        self.done = torch.zeros((shape.max_batch, shape.groups), dtype=torch.int32, device=device)

    def plan(
        self,
        block_tables: Tensor,
        context_lens: Tensor,
        max_context: int,
        programs: int | None = None,
        cost: ItemCost | None = None,
    ) -> ItemPlan:
        """Launch the plan kernel for every window. programs: Of one key/value head that run at once in this step; None: all."""
        programs = min(programs or self.programs, self.programs)
        given = block_tables, None, context_lens, programs, cost or self._cost
        found = {w: self._items(*given, w, 0) for w in self.shape.windows}
        # Programs without an item end at once; those with several take one after the other.
        return ItemPlan(block_tables, context_lens, max_context, found, max(context_lens.shape[0], programs))

    def plan_chunks(
        self,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        programs: int,
        cost: ItemCost,
        tokens: int,
    ) -> dict[int | None, DecodeItems]:
        """The same for sequences of any number of rows.

        Args:
            query_start: [Q + 1] int32. tokens: Rows of an item of a sequence with more than one.
        """
        given = block_tables, query_start, context_lens, programs, cost
        return {w: self._items(*given, w, tokens) for w in self.shape.windows}

    def _items(
        self,
        block_tables: Tensor,
        query_start: Tensor | None,
        context_lens: Tensor,
        programs: int,
        cost: ItemCost,
        window: int | None,
        chunk_tokens: int,
    ) -> DecodeItems:
        batch = context_lens.shape[0]
        empty = context_lens.new_empty
        most = self.most_items
        if chunk_tokens:  # the last item of a sequence may be short
            most += -(-self._chunk_rows // chunk_tokens) + min(batch, self._chunk_rows // 2)
        found = DecodeItems(empty((most, self._width)), empty(batch + 1))
        pdl = {"launch_pdl": True} if self._has_follow else {}
        plan_items_kernel[(_PLAN_PROGRAMS,)](
            context_lens, context_lens if query_start is None else query_start, block_tables, found.items, found.counts,
            batch, programs, self.most_items, self.chunk_keys // TILE, window or 0, cost.start_tiles, cost.join_tiles,
            self.shape.block_size, block_tables.stride(0),
            TILE=TILE, BATCH=self._rows, CHUNKS=64, HEADER=ITEM_HEADER, WIDTH=self._width,
            CHUNK_TOKENS=chunk_tokens, USE_PDL=self._has_follow, num_warps=8, **pdl,
        )  # fmt: skip
        return found


def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; interpreted kernels (tests) run one program at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
