"""`Kernels` of an NVIDIA GPU: cuBLAS and the skinny GEMM for products, our own operations for what reads them, paged attention.

Launches only: nothing here waits for the device, and with one row a sequence everything may be captured in a CUDA graph.

Shape letters: T rows (tokens), K inputs, N outputs, P planes of a product, V (row, page) pairs, M modules of a fused linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from node.errors import ConfigError
from node.kernels.attention.paged import DecodePlan, PagedAttention, PrefillPlan
from node.kernels.cuda_ops import CudaOps, Follow, Product, span_list
from node.kernels.device_rows import SHORT_ROWS, DeviceRows
from node.kernels.head_rows import LogitTops
from node.kernels.linear import LoraSpans, PackedLinear
from node.kernels.lora import LoraPool, LoraRows
from node.kernels.ops import Kernels
from node.kernels.reference import lora_delta

MAX_TOP_ROWS = 256  # of a step whose output projection finds the largest logits itself
PIECE_ROWS = 256  # of the skinny GEMM, where bits may not depend on the batch and it cannot take all rows at once
ROW_BYTES = 16  # a multiple of which the rows are that a kernel of ours takes
EXACT_ROWS = 32  # of a product whose bits may not depend on the batch, where the skinny GEMM cannot run


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One of the two, as the step is: one row a sequence, or anything else."""

    decode: DecodePlan | None
    prefill: PrefillPlan | None


class CudaKernels(Kernels[Product, DeviceRows]):
    """See `Kernels` for every argument.

    Args:
        device: The GPU.
        attention: Backend of paged attention.
        is_deterministic: Rows have the same bits in every batch: fixed splits and products of fixed shapes, several times slower
            in prefill.
        has_follow: Launch our kernels before those before them have ended (programmatic dependent launch).
    """

    takes_tiles = True

    def __init__(
        self,
        device: torch.device,
        attention: PagedAttention,
        *,
        is_deterministic: bool = False,
        has_follow: bool = True,
    ) -> None:
        self._device = device
        self._attention = attention
        self._ops = CudaOps()
        self._is_deterministic = is_deterministic
        self._is_hopper = torch.cuda.get_device_capability(device)[0] == 9
        self._follow = Follow.WAIT_FIRST if has_follow else Follow.PLAIN
        # FA3 schedules its work on the device; the others launch a block for every row that there might be.
        self.has_static_prefill = "fa3" in attention.name and not is_deterministic
        self.short_bound = attention.short_bound
        self._spans: dict[int, tuple[int, ...]] = {}
        self._planes: dict[tuple[int, int, int, bool], int] = {}
        self._gates: dict[tuple[int, int, int], bool] = {}

    @property
    def name(self) -> str:
        return f"cuda-{self._attention.name}"

    @property
    def device(self) -> torch.device:
        return self._device

    def attach(self, pool: LoraPool) -> None:
        """Bind the adapter memory, whose tensors stay where they are from now on."""
        self._ops = CudaOps(pool)

    # ---- products

    def pack_linear(self, weight: Tensor) -> PackedLinear:
        """The weight itself: both GEMMs read rows of inputs. `weight` may still be being filled."""
        return PackedLinear(weight, weight.shape[0], weight.shape[1], is_panelled=False)

    def linear(
        self,
        x: Tensor,
        packed: PackedLinear,
        bias: Tensor | None = None,
        *,
        pool: LoraPool | None = None,
        rows: DeviceRows | None = None,
        spans: LoraSpans | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Product:
        weight = packed.data
        planes = self._skinny_planes(x, weight, rows is not None and spans is not None)
        wide = torch.float32 if x.dtype == torch.float32 else out_dtype or x.dtype
        if rows is None or spans is None:
            return Product(self._multiply(x, weight, planes, wide), bias)
        fields = self._span_list(spans)
        shape = self._shrink_planes(x), rows.pair_count, len(fields) // 6, 16
        v = torch.empty(shape, dtype=torch.float32, device=x.device)
        if self._is_behind(x, planes, rows):
            y = self._multiply(x, weight, planes, wide)
            after = Follow.WAIT_LAST if self._follow is Follow.WAIT_FIRST else Follow.PLAIN
            self._ops.lora_shrink(x, rows.tiles, fields, v, after)
        else:
            self._ops.lora_shrink(x, rows.tiles, fields, v, self._follow)
            y = self._multiply(x, weight, planes, wide)
        return Product(y, bias, rows.tiles, v, fields)

    def _is_behind(self, x: Tensor, planes: int, rows: DeviceRows) -> bool:
        """Whether the shrink runs behind the skinny GEMM and waits for it last, so that whoever waits for the shrink has both.

        The GEMM leaves processors idle, which a few pages fit on. Many pages had better come before: they arrive while the kernel
        ahead still runs. Both have the same bits.
        """
        return planes > 0 and x.shape[0] <= SHORT_ROWS and not rows.has_many

    def _shrink_planes(self, x: Tensor) -> int:
        """Planes of v."""
        can_stream = x.dtype == torch.bfloat16 and self._is_hopper
        return self._ops.shrink_planes(x.shape[1]) if can_stream else 1

    def logits(
        self,
        x: Tensor,
        packed: PackedLinear,
        bias: Tensor | None = None,
        *,
        pool: LoraPool | None = None,
        rows: DeviceRows | None = None,
        spans: LoraSpans | None = None,
        tops: LogitTops | None = None,
    ) -> Tensor:
        weight = packed.data
        is_base = bias is None and (rows is None or spans is None)
        if tops is None or not is_base or x.shape[0] > MAX_TOP_ROWS or self._skinny_planes(x, weight, has_adapters=False) != 1:
            return super().logits(x, packed, bias, pool=pool, rows=rows, spans=spans)
        count, outputs = x.shape[0], weight.shape[0]
        y = torch.empty((count, outputs), dtype=torch.float32, device=x.device)
        tops.parts = torch.empty(
            (count, self._ops.skinny_gemm_parts(outputs, weight.shape[1]), 2), dtype=torch.int32, device=x.device
        )
        self._ops.skinny_gemm_logits(x, weight, tops.wanted, y, tops.parts, self._follow)
        return y

    def finish(self, product: Product, out_dtype: torch.dtype) -> Tensor:
        y = product.y
        if y.shape[0] == 1 and y.dtype == out_dtype and product.bias is None and product.tiles is None:
            return y[0]
        out = torch.empty(y.shape[1:], dtype=out_dtype, device=y.device)
        self._ops.materialize(product, out, self._follow)
        return out

    def unfinish(self, y: Tensor) -> Product:
        return Product(y[None])

    def _skinny_planes(self, x: Tensor, weight: Tensor, has_adapters: bool) -> int:
        """Planes of the skinny GEMM for this product; 0 where cuBLAS runs it."""
        if x.dtype != torch.bfloat16 or not self._is_hopper:
            return 0
        rows = min(x.shape[0], PIECE_ROWS) if self._is_deterministic else x.shape[0]
        key = (rows, *weight.shape, has_adapters)
        planes = self._planes.get(key)
        if planes is None:
            outputs, inputs = weight.shape
            wanted = self._is_deterministic or self._ops.is_skinny_gemm_faster(outputs, inputs, rows, has_adapters=has_adapters)
            planes = self._planes[key] = self._ops.skinny_gemm_planes(outputs, inputs, rows) if wanted else 0
        return planes

    def _multiply(self, x: Tensor, weight: Tensor, planes: int, out_dtype: torch.dtype) -> Tensor:
        """x W^T as [P, T, N] of `out_dtype`, or of float32 where rows are multiplied in pieces."""
        if planes:
            return self._multiply_skinny(x, weight, planes, out_dtype)
        if self._is_deterministic:
            return self._multiply_exactly(x, weight, out_dtype)
        return _mm(x, weight, out_dtype)[None]

    def _multiply_skinny(self, x: Tensor, weight: Tensor, planes: int, out_dtype: torch.dtype) -> Tensor:
        """In pieces of `PIECE_ROWS` only where bits may not depend on the batch."""
        count = x.shape[0]
        if count <= PIECE_ROWS or not self._is_deterministic:
            y = torch.empty((planes, count, weight.shape[0]), dtype=out_dtype, device=x.device)
            self._ops.skinny_gemm(x, weight, y, self._follow)
            return y
        whole = torch.empty((1, count, weight.shape[0]), dtype=torch.float32, device=x.device)
        for first in range(0, count, PIECE_ROWS):
            piece = self._multiply_skinny(x[first : first + PIECE_ROWS], weight, planes, out_dtype)
            self._ops.materialize(Product(piece), whole[0, first : first + PIECE_ROWS], self._follow)
        return whole

    def linear_silu_mul(
        self,
        x: Tensor,
        packed: PackedLinear,
        bias: Tensor | None = None,
        *,
        pool: LoraPool | None = None,
        rows: DeviceRows | None = None,
        spans: LoraSpans | None = None,
    ) -> Tensor:
        weight = packed.data
        has_adapters = rows is not None and spans is not None
        if has_adapters or bias is not None or not self._can_gate(x, weight):
            return super().linear_silu_mul(x, packed, bias, pool=pool, rows=rows, spans=spans)
        out = torch.empty((x.shape[0], weight.shape[0] // 2), dtype=x.dtype, device=x.device)
        self._ops.skinny_gemm_silu_mul(x, weight, out, self._follow)
        return out

    def _can_gate(self, x: Tensor, weight: Tensor) -> bool:
        """Whether silu(gate) * up can be the GEMM's own. Not where bits may not depend on a batch's having adapters."""
        outputs, inputs = weight.shape
        if x.dtype != torch.bfloat16 or not self._is_hopper or self._is_deterministic or outputs % 16:
            return False
        key = (x.shape[0], outputs, inputs)
        can_gate = self._gates.get(key)
        if can_gate is None:
            can_gate = self._gates[key] = self._ops.skinny_gemm_planes(outputs, inputs, x.shape[0]) == 1
        return can_gate

    def _multiply_exactly(self, x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
        """Products of `EXACT_ROWS` rows each, the last one padded: cuBLAS sums in an order that follows the shape."""
        count = x.shape[0]
        padded = x.new_zeros((-(-count // EXACT_ROWS) * EXACT_ROWS, x.shape[1]))
        padded[:count] = x
        starts = range(0, len(padded), EXACT_ROWS)
        pieces = [_mm(padded[first : first + EXACT_ROWS], weight, out_dtype) for first in starts]
        return torch.cat(pieces)[:count][None]

    def _span_list(self, spans: LoraSpans) -> tuple[int, ...]:
        key = id(spans)  # a model's own spans, which live as long as it does
        fields = self._spans.get(key)
        if fields is None:
            fields = self._spans[key] = span_list(spans)
        return fields

    def sgmv(self, y: Tensor, x: Tensor, pool: LoraPool, rows: LoraRows, spans: LoraSpans) -> None:
        delta = lora_delta(x, pool, rows, spans.table, y.shape[1])
        y.copy_((y.float() + delta).to(y.dtype))

    def select_rows(self, rows: DeviceRows | None, wanted: Tensor) -> DeviceRows | None:
        return None if rows is None else rows.wanted

    def head_rows(self, rows: DeviceRows | None, pool: LoraPool | None, module: int) -> DeviceRows | None:
        return rows if rows is not None and rows.has_head else None

    # ---- what reads products

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        self._ops.rms_norm(x, weight, eps, out, self._follow)
        return out

    def embed_rms_norm(
        self, token_ids: Tensor, embedding: Tensor, weight: Tensor, eps: float, *, sources: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        count = (token_ids if sources is None else sources).shape[0]
        x = torch.empty((count, embedding.shape[1]), dtype=embedding.dtype, device=embedding.device)
        out = torch.empty_like(x)
        self._ops.embed_rms_norm(token_ids, embedding, weight, eps, x, out, sources)
        return x, out

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        if x.shape[1] * x.itemsize % ROW_BYTES or rows.dtype != torch.int32:
            return x[rows]
        out = torch.empty((rows.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
        self._ops.take_rows(x, rows, out, self._follow)
        return out

    def add_rms_norm(self, x: Product, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(residual)
        self._ops.add_rms_norm(x, residual, weight, eps, out, self._follow)
        return out

    def silu_mul(self, gate_up: Product) -> Tensor:
        _, count, columns = gate_up.y.shape
        out = torch.empty((count, columns // 2), dtype=self._attention.shape.dtype, device=gate_up.y.device)
        self._ops.silu_mul(gate_up, out, self._follow)
        return out

    def rope_kv_write(
        self,
        qkv: Product,
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
        shape = self._attention.shape
        q = torch.empty((qkv.y.shape[1], shape.heads * shape.head_dim), dtype=shape.dtype, device=qkv.y.device)
        self._ops.rope_kv_write(
            qkv,
            cos,
            sin,
            positions,
            kv_slots,
            key_cache.transpose(1, 2),
            value_cache.transpose(1, 2),
            q,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
            follow=self._follow,
        )
        return q

    # ---- attention

    def plan_attention(
        self,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        max_query: int,
        max_context: int,
        *,
        is_short: bool = False,
    ) -> AttentionPlan:
        attention = self._attention
        if max_query == 1:
            return AttentionPlan(attention.plan_decode(block_tables, context_lens, max_context), None)
        plan = attention.plan_short_prefill if is_short else attention.plan_prefill
        return AttentionPlan(None, plan(block_tables, query_start, context_lens, max_query, max_context))

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
        shape = self._attention.shape
        if plan is None or scale != shape.scale:
            raise ConfigError(f"attention was made for scale {shape.scale} and a step asks for {scale} or has no plan")
        heads = q.view(-1, shape.heads, shape.head_dim)
        out = torch.empty_like(heads)
        keys, values = key_cache.transpose(1, 2), value_cache.transpose(1, 2)
        if plan.decode is not None:
            self._attention.decode(heads, keys, values, plan.decode, out, window=sliding_window)
        else:
            self._attention.prefill(heads, keys, values, plan.prefill, out, window=sliding_window)
        return out.view(q.shape)


def _mm(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """x [T, K] times W^T by cuBLAS, float32 sums, in `out_dtype`."""
    if out_dtype == x.dtype:
        return torch.mm(x, weight.T)
    return torch.mm(x, weight.T, out_dtype=out_dtype)
