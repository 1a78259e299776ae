"""Everything a GPU's step reads from the host, as one run of int32: written with numpy, sent with one copy, viewed as tensors.

The device's memory begins with the tokens that the last step drew, because the next step may be launched before the host knows
them: `sources` says for every row where its token stands, there or among the run's own tokens. Behind them, ahead of what a step
writes, a line of the run's own says where the step leaves what the host wants to know.

A run travels while the step before it computes, on a stream of its own, and a kernel puts it in its place in the order of the
steps. Sent in that order itself it would set out when that step ends, together with adapters that wait for the same moment, and
stand behind one of those in the copy engine: 1.6 ms for 84 MB, in every other step that somebody begins in.

Shape letters: T rows (tokens), Q sequences, W rows that want logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from node.kernels.device_rows import DeviceRows
from node.kernels.head_rows import LogitTops
from node.kernels.lora import LoraRows
from node.kernels.lora_tiles import LINE_INTS, aligned_ints
from node.kernels.side import SideGroup
from node.models.inputs import StepInputs

Ints = npt.NDArray[np.int32]

ANSWER_TURNS = 4  # places for a step's answers: free again when the host, one step ahead or two, launches into them


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Where each section of the run begins, in int32, every one at a multiple of 16 bytes, the tiles at one of 128.

    Attributes:
        rows, sequences, logit_rows: T, Q and W. table_width: blocks of one sequence at most.
        tokens, sources, positions, kv_slots: [T]. query_start: [Q + 1]. context_lens: [Q]. logits: [W]. tables: [Q, table_width].
        wanted: [W], or [T] where every row wants logits: 0 where nobody reads them.
        tiles: the LoRA work, last because it stays on the device while a batch's members do not change.
        size: Without the tiles.
    """

    rows: int
    sequences: int
    logit_rows: int
    table_width: int
    tokens: int
    sources: int
    positions: int
    kv_slots: int
    query_start: int
    context_lens: int
    logits: int
    wanted: int
    tables: int
    tiles: int

    @classmethod
    def of(cls, rows: int, sequences: int, logit_rows: int, table_width: int) -> BlockLayout:
        counts = (rows, rows, rows, rows, sequences + 1, sequences, logit_rows, logit_rows or rows, sequences * table_width)
        starts = np.cumsum([0, *(aligned_ints(count) for count in counts)]).tolist()
        starts[-1] = aligned_ints(starts[-1], LINE_INTS)
        return cls(rows, sequences, logit_rows, table_width, *starts)


class Route:
    """How a run gets to a GPU: copied beside the steps to where it lands, and from there into its place in their order.

    Args:
        turns: Runs that may be on their way. capacity: int32 of the largest. device: the GPU.
    """

    def __init__(self, turns: int, capacity: int, device: torch.device) -> None:
        self._landings = [torch.zeros(capacity, dtype=torch.int32, device=device) for _ in range(turns)]
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))  # the zeros
        self._landed = [torch.cuda.Event() for _ in range(turns)]  # type: ignore[no-untyped-call]
        self._placed = [torch.cuda.Event() for _ in range(turns)]  # type: ignore[no-untyped-call]

    def wait(self, turn: int) -> None:
        """Until the host's copy of this turn may be written again."""
        self._landed[turn].synchronize()

    def send(self, turn: int, host: Tensor, place: Tensor) -> None:
        """Copy `host` (pinned) into `place`, both [n] int32."""
        steps, landing = torch.cuda.current_stream(), self._landings[turn][: len(host)]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._placed[turn])
            landing.copy_(host, non_blocking=True)
            self._landed[turn].record(self._stream)
        steps.wait_event(self._landed[turn])
        torch.add(landing, 0, out=place)  # a kernel: a copy might wait for the copy engine
        self._placed[turn].record(steps)


class StepBlock:
    """The run on both sides: two pinned copies on the host and where they land, taken in turns, and the place that steps read.

    A host copy is written again two steps later, once the device has read it: a step that draws no token is not waited for, so
    the host may be more than one step ahead.

    Args:
        drawn: Tokens that one step can draw.
        capacity: int32 of the largest run.
        device: Where it goes.

    Attributes:
        tokens: int32. What `sources` index.
        drawn: [drawn] int32. The last step's tokens, in the order it drew them.
        answer_turn: Which of `ANSWER_TURNS` places the run that was sent last names. answer_turn_word: [1] int32, on the device.
    """

    def __init__(self, drawn: int, capacity: int, device: torch.device) -> None:
        self._capacity = capacity
        line = aligned_ints(drawn, LINE_INTS)
        self._start = line + LINE_INTS
        is_gpu = device.type == "cuda"
        size = LINE_INTS + capacity
        self._hosts = [torch.zeros(size, dtype=torch.int32, pin_memory=is_gpu) for _ in range(2)]
        self.tokens = torch.zeros(line + size, dtype=torch.int32, device=device)
        self._place = self.tokens[line:]
        self._device = self.tokens[self._start :]
        self._turn = 0
        self._route = Route(len(self._hosts), size, device) if is_gpu else None
        self.drawn = self.tokens[:drawn]
        self.answer_turn = 0
        self.answer_turn_word = self._place[:1]

    @property
    def capacity(self) -> int:
        return self._capacity

    def begin(self, needed: int) -> Ints:
        """The host's copy for the next step; waits until the device has read what it held before.

        Raises:
            ValueError: The step needs more than the capacity.
        """
        if needed > self._capacity:
            raise ValueError(f"a step needs {needed} int32 of metadata and the engine has room for {self._capacity}")
        self._turn = 1 - self._turn
        if self._route is not None:
            self._route.wait(self._turn)
        return self._hosts[self._turn].numpy()[LINE_INTS:]

    def send(self, count: int) -> None:
        """Put the first `count` int32 in their place on the device, in stream order."""
        host, place = self._hosts[self._turn][: LINE_INTS + count], self._place[: LINE_INTS + count]
        self.answer_turn = self.next_answer_turn
        host[0] = self.answer_turn
        if self._route is None:
            place.copy_(host)
        else:
            self._route.send(self._turn, host, place)

    @property
    def next_answer_turn(self) -> int:
        """Which one the next run will name."""
        return (self.answer_turn + 1) % ANSWER_TURNS

    def view(self, start: int, count: int) -> Tensor:
        """A section on the device."""
        return self._device[start : start + count]

    def source_of_own(self, index: int) -> int:
        """`sources` value of the run's own int32 at `index`."""
        return self._start + index

    def inputs(
        self,
        layout: BlockLayout,
        lora: LoraRows | DeviceRows | None,
        *,
        logit_rows: int | None,
        max_query: int,
        max_context: int,
        has_tops: bool = False,
        side: tuple[SideGroup, ...] | None = None,
    ) -> StepInputs:
        """What a model reads of a run that was sent.

        Args:
            logit_rows: How many of the layout's W are wanted; None: every row is.
            has_tops: `wanted` was written.
            lora, side, max_query, max_context: See `StepInputs`.
        """
        rows, sequences, width = layout.rows, layout.sequences, layout.table_width
        tops = LogitTops(self.view(layout.wanted, rows if logit_rows is None else logit_rows)) if has_tops else None
        return StepInputs(
            token_ids=self.tokens,
            sources=self.view(layout.sources, rows),
            positions=self.view(layout.positions, rows),
            kv_slots=self.view(layout.kv_slots, rows),
            query_start=self.view(layout.query_start, sequences + 1),
            context_lens=self.view(layout.context_lens, sequences),
            block_tables=self.view(layout.tables, sequences * width).view(sequences, width),
            logit_rows=None if logit_rows is None else self.view(layout.logits, logit_rows),
            lora=lora,
            side=side,
            max_query=max_query,
            max_context=max_context,
            tops=tops,
        )


def upload(values: Sequence[int], device: torch.device) -> Tensor:
    """[n] int64 on the device, without waiting for it: from pinned memory, which torch keeps until it is read."""
    host = torch.tensor(list(values), dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
