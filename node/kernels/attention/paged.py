"""What every attention backend on a GPU offers.

A step plans once, before its layers, and every layer then runs with that plan: what depends on lengths alone (splits of the keys,
a scheduler's table) is worked out once and not 32 times.

Shape letters: T rows (tokens), Q sequences in the step, N query heads, G key/value heads, D head size, B block size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What stays the same for the life of a model.

    Attributes:
        heads, groups, head_dim: N, G, D; N is a multiple of G.
        block_size: B, tokens of one cache block.
        dtype: of q, of the cache and of the output: bfloat16, float16 or float32.
        scale: of the scores, before the softmax: D ** -0.5 for the Llama families.
        max_batch: most sequences of one decode step. max_context: most tokens of one sequence.
        windows: every value that `window` will have in a call: what the model's layers use.
    """

    heads: int
    groups: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    scale: float
    max_batch: int
    max_context: int
    windows: tuple[int | None, ...] = (None,)

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.groups


@dataclass(slots=True)
class DecodePlan:
    """One row a sequence. Tensors are the caller's own and static under a CUDA graph.

    Attributes:
        block_tables: [Q, max_blocks] int32. context_lens: [Q] int32, the row itself included; 0 for a padding row.
        max_context: no context_lens is larger; fixed when a graph is captured.
    """

    block_tables: Tensor
    context_lens: Tensor
    max_context: int


@dataclass(slots=True)
class PrefillPlan:
    """Any number of rows a sequence, the last ones of its context (so decode rows may be among them).

    Attributes:
        block_tables: [Q, max_blocks] int32. query_start: [Q + 1] int32. context_lens: [Q] int32, the step's own rows included.
        max_query, max_context: the most rows and tokens of one sequence, known on the host.
    """

    block_tables: Tensor
    query_start: Tensor
    context_lens: Tensor
    max_query: int
    max_context: int


@dataclass(frozen=True, slots=True)
class ShortBound:
    """Up to where a step is short. Of sequences of one row only the row counts: they are decode's.

    Attributes:
        rows: The most rows of the step.
        context: The most tokens of a sequence with several rows: how long one block of threads is at work.
        pairs: The most rows times tokens of such sequences together: how long all are.
    """

    rows: int
    context: int
    pairs: int

    def holds(self, sequences: Sequence[tuple[int, int]]) -> bool:
        """Whether a step of these (rows, context) is short."""
        chunks = [(rows, context) for rows, context in sequences if rows > 1]
        pairs = sum([rows * context for rows, context in chunks])
        longest = max([context for _, context in chunks], default=0)
        return sum([rows for rows, _ in sequences]) <= self.rows and longest <= self.context and pairs <= self.pairs


class PagedAttention(ABC):
    """Causal attention over paged keys and values on one GPU. Runs on torch's current stream.

    Keys and values are [blocks, B, G, D] with any block and token strides, heads and head size contiguous; entries beyond a
    context are never read into a result, whatever they hold (NaN included). Plans of decode may be made and used while a CUDA
    graph is captured: nothing waits for the device, and nothing is allocated when the graph runs again.
    """

    short_bound: ShortBound | None = None  # of steps for which there is a kernel of its own

    def __init__(self, shape: AttentionShape, device: torch.device, *, is_deterministic: bool = False) -> None:
        self.shape = shape
        self.device = device
        self.is_deterministic = is_deterministic

    @property
    @abstractmethod
    def name(self) -> str:
        """ "fa3", "fa2", "varlen" or "triton"."""

    def plan_decode(self, block_tables: Tensor, context_lens: Tensor, max_context: int) -> DecodePlan:
        """Plan a step of one row a sequence, once, before the first layer. Launches at most one small kernel a window.

        `block_tables` and `context_lens` must be older than the kernel before, beside which that one may run. It must have
        completed before the kernel ahead of `decode` begins: a kernel that waits for it has to stand between.
        """
        return DecodePlan(block_tables, context_lens, max_context)

    @abstractmethod
    def decode(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: DecodePlan, out: Tensor, *, window: int | None = None
    ) -> Tensor:
        """Attend with the newest row of every sequence.

        Semantics: out[s, n] = softmax(scale q[s, n] K_s^T) V_s over the last `window` tokens of sequence s.

        Args:
            q: [Q, N, D]. keys, values: one layer of the cache.
            out: [Q, N, D], written. Rows with context 0 get 0.
            window: a row sees this many last tokens, itself included; None for all.

        Returns:
            `out`. With `is_deterministic` a row's bits do not depend on the other rows, on Q or on padding.
        """

    def plan_prefill(
        self, block_tables: Tensor, query_start: Tensor, context_lens: Tensor, max_query: int, max_context: int
    ) -> PrefillPlan:
        """Plan a step with prompt chunks. Not for capture."""
        return PrefillPlan(block_tables, query_start, context_lens, max_query, max_context)

    def plan_short_prefill(
        self, block_tables: Tensor, query_start: Tensor, context_lens: Tensor, max_query: int, max_context: int
    ) -> PrefillPlan:
        """The same for a short step, for capture like `plan_decode`. Right beyond the bound's context and pairs too, but slow."""
        return self.plan_prefill(block_tables, query_start, context_lens, max_query, max_context)

    @abstractmethod
    def prefill(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: PrefillPlan, out: Tensor, *, window: int | None = None
    ) -> Tensor:
        """Attend with every row of the step, causally; sequence s's rows are query_start[s] .. query_start[s + 1] - 1 of q.

        Args:
            q: [T, N, D]. out: [T, N, D], written for the rows of the plan.

        Returns:
            `out`. With `is_deterministic` a row's bits equal those of `decode` at the same context, whatever the chunk.
        """
