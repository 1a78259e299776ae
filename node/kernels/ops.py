"""The one door to the arithmetic of a step: compiled kernels where they are built, plain torch otherwise.

A `Kernels` object is chosen once, at start, and handed to the model. Both implementations have the same methods.

Shape letters: T rows (tokens), H hidden, O outputs, I intermediate, G key/value heads, D head size, B block size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from node.kernels.linear import LoraSpans, PackedLinear, lora_spans
from node.kernels.lora import LoraPool, LoraRows

__all__ = ["Kernels", "LoraSpans", "Mode", "PackedLinear", "lora_spans"]

Mode = Literal["auto", "cpp", "reference"]


class Kernels(ABC):
    """Arithmetic of one step. All tensors lie on the CPU, rows are contiguous, dtypes are float32 or bfloat16.

    Every result of the compiled kernels is bitwise the same for a row alone, in any batch, in any prefill chunk and with any
    number of threads. `TorchKernels` keeps that promise only when made with `is_deterministic=True`.
    """

    @staticmethod
    def load(
        mode: Mode = "auto", *, threads: int | None = None, isa: str | None = None, is_deterministic: bool = False
    ) -> Kernels:
        """Choose the kernels of this process.

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
        """ "cpp-avx512bf16", "cpp-avx512", "cpp-avx2" or "reference"."""

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
        rows: LoraRows | None = None,
        spans: LoraSpans | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """y = x W^T + bias + every row's own adapter deltas, summed in float32 and rounded once.

        Args:
            x: [T, H]. packed: the weight. bias: [O] or None.
            pool, rows, spans: The adapters; all three or `rows=None`, which costs nothing.
            out_dtype: Defaults to x's; float32 for logits.

        Returns:
            [T, O].
        """

    @abstractmethod
    def sgmv(self, y: Tensor, x: Tensor, pool: LoraPool, rows: LoraRows, spans: LoraSpans) -> None:
        """Add every row's own adapter deltas to y [T, O] in place, where the base linear is not ours."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """weight * x / sqrt(mean(x^2) + eps). x: [T, H]."""

    @abstractmethod
    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x in place, then `rms_norm` of the rounded residual. x, residual: [T, H]."""

    @abstractmethod
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up. gate_up: [T, 2 I], gate first; returns [T, I]."""

    @abstractmethod
    def rope_kv_write(
        self,
        qkv: Tensor,
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
            positions, kv_slots: [T] int64. kv_slots are block * B + offset.
            key_cache, value_cache: [blocks, G, B, D], written.
            q_norm, k_norm: [D] weights of Qwen3's per-head norms, or None. eps: theirs.

        Returns:
            [T, heads D].
        """

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
    ) -> Tensor:
        """Causal attention of each sequence's rows over its cache blocks, prefill chunks and decode alike.

        Args:
            q: [T, heads D]. The last row of sequence s stands at position context_lens[s] - 1.
            block_tables: [Q, max_blocks] int32. query_start: [Q + 1] int32. context_lens: [Q] int32.
            sliding_window: A row sees this many last keys, itself included; None for all.

        Returns:
            [T, heads D].
        """
