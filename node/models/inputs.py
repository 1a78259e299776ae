"""What one step hands to a model, and what stays in memory between steps.

Shape letters: T rows (tokens of all sequences, concatenated), Q sequences in the step, W rows that want logits,
E of them whose hidden state is wanted, V vocabulary, H hidden, B block size, G key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from node.kernels.device_rows import DeviceRows
from node.kernels.head_rows import LogitTops
from node.kernels.lora import LoraPool, LoraRows
from node.kernels.side import SideGroup


@dataclass(slots=True)
class StepInputs:
    """One step's batch as flat tensors.

    Attributes:
        token_ids: [T] int64; where `sources` says which, any number of integers.
        sources: [T] int32. Where in token_ids each row's token stands; None: row t's is the t-th.
        positions: [T] int64. Absolute position of each row in its sequence.
        kv_slots: [T] int64. Where the row's key and value go: block * B + offset.
        query_start: [Q + 1] int32. Rows of sequence q are query_start[q] .. query_start[q + 1] - 1.
        context_lens: [Q] int32. Tokens of the sequence after this step; the last row attends to all of them.
        block_tables: [Q, max_blocks] int32. Unused entries are 0.
        logit_rows: [W] int64. Rows whose logits are wanted; None for all.
        lora: The rows' adapters as the kernels take them; None when no row uses one.
        side: Rows whose adapters have more than pages hold (DoRA, biases, the embedding); None when there are none.
        max_query, max_context: The most rows and tokens of one sequence; a GPU's attention wants to know.
        is_short: Its prompt chunks have few keys; see `Kernels.short_bound`.
        hidden_rows: [E] int64. Which of the W rows want their hidden state too; None for none.
        hidden: [E, H] float32, written by the model: hidden states after the final norm, of `hidden_rows`.
        tops: Which logits are read, and the largest of every row where the model's kernels find them; None: all are read.
    """

    token_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    logit_rows: Tensor | None
    lora: LoraRows | DeviceRows | None
    side: tuple[SideGroup, ...] | None = None
    max_query: int = 0
    max_context: int = 0
    is_short: bool = False
    hidden_rows: Tensor | None = None
    hidden: Tensor | None = None
    tops: LogitTops | None = None
    sources: Tensor | None = None

    def row_token_ids(self) -> Tensor:
        """[T]. An operation of its own: `Kernels.embed_rms_norm` does without."""
        return self.token_ids if self.sources is None else self.token_ids[self.sources]


@dataclass(slots=True)
class KVCache:
    """Paged keys and values of every layer.

    Attributes:
        keys: one [blocks, G, B, D] tensor a layer; on a GPU a view of [blocks, B, G, D].
        values: the same.
        block_size: B.
    """

    keys: list[Tensor]
    values: list[Tensor]
    block_size: int

    @property
    def block_count(self) -> int:
        return int(self.keys[0].shape[0])


class Attended(NamedTuple):
    """A step behind the last layer's attention, of the rows that want logits.

    Attributes:
        attention: [W, heads D]. What the last layer's o projection reads.
        residual: [W, H]. What that layer began with; written by whoever finishes it.
    """

    attention: Tensor
    residual: Tensor


class CausalLM(Protocol):
    """A decoder the engine can run. Stateless between calls but for its weights."""

    def forward(self, inputs: StepInputs, kv: KVCache, pool: LoraPool | None) -> Tensor:
        """Return logits [W, V] float32 of `inputs.logit_rows`, after writing the step's keys and values into `kv`."""
        ...

    def attended(self, inputs: StepInputs, kv: KVCache, pool: LoraPool | None) -> Attended:
        """The first part of `forward`: everything up to the last layer's attention."""
        ...

    def logits(self, attended: Attended, inputs: StepInputs, pool: LoraPool | None) -> Tensor:
        """The second part; of `inputs` it reads `logit_rows`, `lora`, `side`, `hidden_rows` and `tops`."""
        ...
