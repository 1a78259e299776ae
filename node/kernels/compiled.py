"""`Kernels` over the C++ library built from `csrc/`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from node.errors import ConfigError
from node.kernels.build import library_path
from node.kernels.fakes import register_fakes
from node.kernels.head_rows import head_rows, select_rows
from node.kernels.linear import LoraSpans, PackedLinear
from node.kernels.lora import LoraPool, LoraRows
from node.kernels.memory import WeightArena
from node.kernels.ops import Kernels

ISAS = ("avx2", "avx512", "avx512bf16")  # the order of csrc/cpu/dispatch.h


class CompiledKernels(Kernels[Tensor, LoraRows]):
    """The compiled implementation. See `Kernels` for every argument.

    Args:
        isa: One of `ISAS`; this CPU must have it.
        threads: Threads of every operation, the caller's among them.
    """

    def __init__(self, isa: str, threads: int) -> None:
        self._isa = ISAS.index(isa)
        self._threads = threads
        self._arena = WeightArena()
        self._name = f"cpp-{isa}"
        ops = torch.ops.openlora
        # Bound once: looking an overload up through torch.ops costs more than the small operations themselves.
        self._pack_linear = ops.pack_linear.default
        self._linear = ops.linear.default
        self._lora_linear = ops.lora_linear.default
        self._sgmv = ops.sgmv.default
        self._rms_norm = ops.rms_norm.default
        self._add_rms_norm = ops.add_rms_norm.default
        self._silu_mul = ops.silu_mul.default
        self._rope_kv_write = ops.rope_kv_write.default
        self._paged_attention = ops.paged_attention.default

    @classmethod
    def open(cls, isa: str | None, threads: int, *, is_required: bool) -> CompiledKernels | None:
        """Load the library and take the best (or the named) instruction set; None when absent and not required.

        Raises:
            ConfigError: It is required and not built, or the CPU lacks the instructions, or `isa` is unknown.
        """
        if isa is not None and isa not in ISAS:
            raise ConfigError(f"kernel instruction set {isa!r} is unknown; choose one of {', '.join(ISAS)}")
        path = library_path()
        if path is None:
            if is_required or isa is not None:
                raise ConfigError(
                    "the C++ kernels of these sources are not built; run `python -m node.kernels.build`, "
                    "or set engine.kernels to auto"
                )
            return None
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        register_fakes()
        best = int(torch.ops.openlora.best_isa())
        wanted = best if isa is None else ISAS.index(isa)
        if 0 <= wanted <= best:
            return cls(ISAS[wanted], threads)
        if is_required or isa is not None:
            has = ISAS[best] if best >= 0 else "none of them"
            raise ConfigError(
                f"this CPU cannot run the kernels' {isa or 'avx2'} path (it has {has}); set engine.kernels to reference"
            )
        return None

    @property
    def name(self) -> str:
        return self._name

    def pack_linear(self, weight: Tensor) -> PackedLinear:
        return PackedLinear(
            self._arena.copy(self._pack_linear(weight.contiguous())), weight.shape[0], weight.shape[1], is_panelled=True
        )

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
        is_float = x.dtype == torch.float32 or out_dtype == torch.float32
        if rows is None or pool is None or spans is None:
            return self._linear(x, packed.data, bias, packed.out_features, is_float, self._isa, self._threads)  # type: ignore[no-any-return]
        return self._lora_linear(  # type: ignore[no-any-return]
            x,
            packed.data,
            bias,
            packed.out_features,
            is_float,
            pool.pages,
            pool.slot_pages,
            pool.ranks,
            pool.scales,
            pool.page_rank,
            rows.row_start,
            rows.slot,
            rows.weight,
            spans.table,
            self._isa,
            self._threads,
        )

    def finish(self, product: Tensor, out_dtype: torch.dtype) -> Tensor:
        return product

    def unfinish(self, y: Tensor) -> Tensor:
        return y

    def select_rows(self, rows: LoraRows | None, wanted: Tensor) -> LoraRows | None:
        return None if rows is None else select_rows(rows, wanted)

    def head_rows(self, rows: LoraRows | None, pool: LoraPool | None, module: int) -> LoraRows | None:
        return head_rows(rows, pool, module)

    def sgmv(self, y: Tensor, x: Tensor, pool: LoraPool, rows: LoraRows, spans: LoraSpans) -> None:
        self._sgmv(
            y,
            x,
            pool.pages,
            pool.slot_pages,
            pool.ranks,
            pool.scales,
            pool.page_rank,
            rows.row_start,
            rows.slot,
            rows.weight,
            spans.table,
            self._isa,
            self._threads,
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._rms_norm(x, weight, eps, self._isa, self._threads)  # type: ignore[no-any-return]

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._add_rms_norm(x, residual, weight, eps, self._isa, self._threads)  # type: ignore[no-any-return]

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self._silu_mul(gate_up, self._isa, self._threads)  # type: ignore[no-any-return]

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
        return self._rope_kv_write(  # type: ignore[no-any-return]
            qkv, cos, sin, positions, kv_slots, key_cache, value_cache, q_norm, k_norm, eps, self._isa, self._threads
        )

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
        window = 0 if sliding_window is None else sliding_window
        return self._paged_attention(  # type: ignore[no-any-return]
            q, key_cache, value_cache, block_tables, query_start, context_lens, scale, window, self._isa, self._threads
        )
