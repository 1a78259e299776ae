"""The one door to the arithmetic of a step: compiled kernels where they are built, plain torch otherwise.

A `Kernels` object is chosen once, at start, and handed to the model. Both implementations have the same methods.

Shape letters: T rows (tokens), H hidden, O outputs, I intermediate, G key/value heads, D head size, B block size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor

from node.kernels.attention.paged import ShortBound
from node.kernels.head_rows import LogitTops
from node.kernels.linear import LoraSpans, PackedLinear, lora_spans
from node.kernels.lora import LoraPool, LoraRows

__all__ = ["Kernels", "LoraSpans", "Mode", "PackedLinear", "lora_spans"]

Mode = Literal["auto", "cpp", "reference"]
ProductT = TypeVar("ProductT")
RowsT = TypeVar("RowsT")


class Kernels(ABC, Generic[ProductT, RowsT]):
    """Arithmetic of one step. All tensors lie on `device`, rows are contiguous, dtypes are float32 or bfloat16.

    A *product* is what a linear layer hands to the operation that reads it: on the CPU the finished tensor [T, O], on a GPU
    planes whose sum, bias and adapter deltas that operation adds on its way, so that they never go through memory.
    *Rows* say which adapters each row of the step uses.

    Every result of the compiled kernels is bitwise the same for a row alone, in any batch, in any prefill chunk and with any
    number of threads. The others keep that promise only when made with `is_deterministic=True`.

    Attributes:
        takes_tiles: Rows are `DeviceRows`; otherwise they are `LoraRows`, which lie on the CPU whatever `device` is.
        has_static_prefill: A step with prompt chunks may be recorded and replayed with lengths up to those it was made for.
        short_bound: Up to where a recorded step with prompt chunks is short, which has an attention of its own; None: none is.
    """

    takes_tiles: ClassVar[bool] = False
    has_static_prefill: bool = False
    short_bound: ShortBound | None = None

    @staticmethod
    def load(
        mode: Mode = "auto", *, threads: int | None = None, isa: str | None = None, is_deterministic: bool = False
    ) -> Kernels[Tensor, LoraRows]:
        """Choose the kernels of this process on a CPU. `node.kernels.cuda_kernels` has those of a GPU.

        Args:
            mode: "auto" takes the compiled ones where they are built and this CPU can run them, "cpp" insists,
                "reference" is plain torch.
            threads: Threads of the compiled operations, 1 to 64; None takes torch's number now. They are not torch's own: a
                process that serves does `torch.set_num_threads(1)` afterwards, because torch's idle OpenMP workers spin for
                milliseconds and take the cores from these.
            isa: Force "avx2", "avx512" or "avx512bf16" (tests, benchmarks); None takes the best of this CPU.
            is_deterministic: Bitwise batch invariance for the reference too (row by row, slow); the compiled ones have it always.

        Raises:
            ConfigError: mode "cpp" and the library is not built, or this CPU lacks the instructions.
        """
        from node.kernels.compiled import CompiledKernels  # both implement this class, so they cannot be imported above it
        from node.kernels.torch_kernels import TorchKernels

        if mode == "reference":
            return TorchKernels(is_deterministic=is_deterministic)
        count = torch.get_num_threads() if threads is None else threads
        compiled = CompiledKernels.open(isa, count, is_required=mode == "cpp")
        return TorchKernels(is_deterministic=is_deterministic) if compiled is None else compiled

    @property
    @abstractmethod
    def name(self) -> str:
        """ "cpp-avx512bf16", "cpp-avx512", "cpp-avx2", "cuda" or "reference"."""

    @property
    def device(self) -> torch.device:
        """Where weights, cache and activations lie."""
        return torch.device("cpu")

    @abstractmethod
    def pack_linear(self, weight: Tensor) -> PackedLinear:
        """Copy a [O, H] weight into the order the kernel reads."""

    @abstractmethod
    def linear(
        self,
        x: Tensor,
        packed: PackedLinear,
        bias: Tensor | None = None,
        *,
        pool: LoraPool | None = None,
        rows: RowsT | None = None,
        spans: LoraSpans | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> ProductT:
        """y = x W^T + bias + every row's own adapter deltas, summed in float32 and rounded once.

        Args:
            x: [T, H]. packed: the weight. bias: [O] or None.
            pool, rows, spans: The adapters; all three or `rows=None`, which costs nothing.
            out_dtype: Defaults to x's; float32 for logits.

        Returns:
            The product [T, O].
        """

    def logits(
        self,
        x: Tensor,
        packed: PackedLinear,
        bias: Tensor | None = None,
        *,
        pool: LoraPool | None = None,
        rows: RowsT | None = None,
        spans: LoraSpans | None = None,
        tops: LogitTops | None = None,
    ) -> Tensor:
        """`linear` in float32, finished: [W, O].

        Args:
            tops: Says which rows are read, and takes their largest logits, where these kernels find them on the way.
        """
        return self.finish(
            self.linear(x, packed, bias, pool=pool, rows=rows, spans=spans, out_dtype=torch.float32), torch.float32
        )

    @abstractmethod
    def finish(self, product: ProductT, out_dtype: torch.dtype) -> Tensor:
        """The product as a tensor [T, O]. `out_dtype` is the one that `linear` was asked for."""

    @abstractmethod
    def unfinish(self, y: Tensor) -> ProductT:
        """A finished tensor [T, O] as a product, for whoever changed it after `finish`."""

    @abstractmethod
    def sgmv(self, y: Tensor, x: Tensor, pool: LoraPool, rows: LoraRows, spans: LoraSpans) -> None:
        """Add every row's own adapter deltas to y [T, O] in place, where the base linear is not ours."""

    @abstractmethod
    def select_rows(self, rows: RowsT | None, wanted: Tensor) -> RowsT | None:
        """The adapters of some rows, in the order of `wanted` [W]. On a GPU those that came with the step: of `logit_rows`."""

    @abstractmethod
    def head_rows(self, rows: RowsT | None, pool: LoraPool | None, module: int) -> RowsT | None:
        """`rows`, or None where no adapter changes the output projection, `module` of which is the row in `LoraPool.ranks`."""

    def embed_rms_norm(
        self, token_ids: Tensor, embedding: Tensor, weight: Tensor, eps: float, *, sources: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x = embedding[token_ids] [T, H] and `rms_norm` of it. A step's first operation.

        Args:
            token_ids: [T]. embedding: [V, H].
            sources: [T]: where in token_ids each row's token stands; None: in order.
        """
        x = embedding[token_ids if sources is None else token_ids[sources]]
        return x, self.rms_norm(x, weight, eps)

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """x[rows]. x: [T, H]; rows: [W] integers."""
        return x[rows]

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """weight * x / sqrt(mean(x^2) + eps). x: [T, H]."""

    @abstractmethod
    def add_rms_norm(self, x: ProductT, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x in place, then `rms_norm` of the rounded residual. x, residual: [T, H]."""

    @abstractmethod
    def silu_mul(self, gate_up: ProductT) -> Tensor:
        """silu(gate) * up. gate_up: [T, 2 I], gate first; returns [T, I]."""

    def linear_silu_mul(
        self,
        x: Tensor,
        packed: PackedLinear,
        bias: Tensor | None = None,
        *,
        pool: LoraPool | None = None,
        rows: RowsT | None = None,
        spans: LoraSpans | None = None,
    ) -> Tensor:
        """`silu_mul` of `linear`, arguments as there. Returns [T, I]."""
        return self.silu_mul(self.linear(x, packed, bias, pool=pool, rows=rows, spans=spans))

    @abstractmethod
    def rope_kv_write(
        self,
        qkv: ProductT,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        kv_slots: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        """Rotate q and k (half-split), write k and v into the paged cache, return q.

        Args:
            qkv: [T, (heads + 2 G) D], q then k then v.
            cos, sin: [positions, D / 2] float32.
            positions, kv_slots: [T] integers. kv_slots are block * B + offset; negative on a GPU: padding, nothing is written.
            key_cache, value_cache: [blocks, G, B, D], written; on a GPU a view of [blocks, B, G, D].
            q_norm, k_norm: [D] weights of Qwen3's per-head norms, or None. eps: theirs.

        Returns:
            [T, heads D].
        """

    def plan_attention(
        self,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        max_query: int,
        max_context: int,
        *,
        is_short: bool = False,
    ) -> Any:
        """What depends on the lengths of a step alone, worked out once for all layers, after `embed_rms_norm` and before them.

        See `paged_attention` for the tensors.

        Args:
            max_query, max_context: The most rows and tokens of one sequence.
            is_short: Within `short_bound`.

        Returns:
            The `plan` of `paged_attention`; None where the kernel needs none.
        """
        return None

    @abstractmethod
    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        scale: float,
        sliding_window: int | None = None,
        plan: Any = None,
    ) -> Tensor:
        """Causal attention of each sequence's rows over its cache blocks, prefill chunks and decode alike.

        Args:
            q: [T, heads D]. The last row of sequence s stands at position context_lens[s] - 1.
            block_tables: [Q, max_blocks] int32. query_start: [Q + 1] int32. context_lens: [Q] int32.
            sliding_window: A row sees this many last keys, itself included; None for all.
            plan: What `plan_attention` gave for this step.

        Returns:
            [T, heads D].
        """
