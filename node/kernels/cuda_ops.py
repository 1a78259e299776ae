"""The CUDA library's operations as Python functions. Every output is the caller's: nothing here allocates or synchronises, and
all of it can be captured in a CUDA graph. `csrc/cuda/*.h` says what each kernel does.

With `Follow.WAIT_FIRST` a kernel reads before its wait what does not come from the kernel before it (pages, residual, positions,
kv_slots): those must have been written before that kernel began.

Shape letters: T rows (tokens), V (row, entry) pairs of the tiles, M modules of the model, G modules of one fused linear,
S slots, H hidden, N columns of a product, P planes of a product, I intermediate, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from node.errors import ConfigError
from node.kernels.build_cuda import cuda_library_path
from node.kernels.fakes import register_cuda_fakes
from node.kernels.linear import LoraSpans
from node.kernels.lora import LoraPool


class Follow(IntEnum):
    """How a kernel follows the one before it in its stream; see `csrc/cuda/lora_work.h`."""

    PLAIN = 0
    WAIT_FIRST = 1
    WAIT_LAST = 2  # shrink only


@dataclass(frozen=True, slots=True)
class DeviceTiles:
    """A step's LoRA work on the device.

    Attributes:
        block: int32, device, 16-byte aligned. `node.kernels.lora_tiles.TileBlock.data`, and room behind it.
        tile_rows: No tile has more rows; 16 at most.
    """

    block: Tensor
    tile_rows: int


@dataclass(frozen=True, slots=True)
class Product:
    """A linear's result on its way to the operation that finishes it: y = sum over planes + bias + v B.

    Attributes:
        y: [P, T, N], float32, or bfloat16 where the model is.
        bias: [N] or None.
        tiles: None where no row of the step has an adapter; otherwise exactly the rows of the tiles are finished.
        v: [C, V or more, G, 16] float32, its sum over C: what a shrink wrote for these spans. None with `tiles`.
        spans: The linear's modules, as `span_list` gives them. Empty with `tiles` None.
    """

    y: Tensor
    bias: Tensor | None = None
    tiles: DeviceTiles | None = None
    v: Tensor | None = None
    spans: tuple[int, ...] = ()


def span_list(spans: LoraSpans) -> tuple[int, ...]:
    """The rows of a `LoraSpans` one after another, as the operations take them. Call once a linear, not once a step."""
    return tuple(int(field) for field in spans.table.flatten().tolist())


class CudaOps:
    """The loaded library.

    Args:
        pool: Adapter memory on the device, None where the engine has none. Its tensors must stay where they are.
    """

    def __init__(self, pool: LoraPool | None = None) -> None:
        path = cuda_library_path()
        if path is None:
            raise ConfigError("the CUDA kernels of these sources are not built; run `python -m node.kernels.build` where nvcc is")
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        register_cuda_fakes()
        ops = torch.ops.openlora
        # Bound once: looking an overload up through torch.ops costs more than launching a small kernel.
        self._lora_shrink = ops.lora_shrink.default
        self._lora_shrink_planes = ops.lora_shrink_planes.default
        self._silu_mul = ops.fused_silu_mul.default
        self._add_rms_norm = ops.fused_add_rms_norm.default
        self._rope_kv_write = ops.fused_rope_kv_write.default
        self._materialize = ops.materialize.default
        self._rms_norm = ops.rms_norm_into.default
        self._embed_rms_norm = ops.embed_rms_norm.default
        self._take_rows = ops.take_rows.default
        self._skinny_gemm = ops.skinny_gemm.default
        self._skinny_gemm_silu_mul = ops.skinny_gemm_silu_mul.default
        self._skinny_gemm_logits = ops.skinny_gemm_logits.default
        self._skinny_gemm_parts = ops.skinny_gemm_parts.default
        self._skinny_gemm_planes = ops.skinny_gemm_planes.default
        self._is_skinny_gemm_faster = ops.is_skinny_gemm_faster.default
        self._pages = None if pool is None else pool.pages
        self._ranks = None if pool is None else pool.ranks
        self._scales = None if pool is None else pool.scales

    def lora_shrink(
        self, x: Tensor, tiles: DeviceTiles, spans: tuple[int, ...], v: Tensor, follow: Follow = Follow.WAIT_FIRST
    ) -> None:
        """v[pair, g] = weight * scale * x A_g^T for every pair of the tiles.

        Args:
            x: [T, K], rows may be strided. v: [C, V or more, G, 16] float32, written; C is 1, or `shrink_planes` on
                Hopper. With `shrink_planes` and Follow.WAIT_FIRST whatever follows may begin at once: before its
                wait it must read nothing that a kernel of the step writes.
        """
        self._lora_shrink(x, self._pages, tiles.block, self._ranks, self._scales, spans, tiles.tile_rows, int(follow), v)

    def shrink_planes(self, inputs: int) -> int:
        """C, 1 to 8: ranges of the inputs whose sums `lora_shrink` may keep apart, as many as are fastest."""
        return int(self._lora_shrink_planes(inputs))

    def silu_mul(self, product: Product, out: Tensor, follow: Follow = Follow.WAIT_FIRST) -> None:
        """out [T, I] = silu(y[:, :I]) * y[:, I:]."""
        self._silu_mul(product.y, product.bias, *self._lora(product), int(follow), out)

    def add_rms_norm(
        self, product: Product, residual: Tensor, weight: Tensor, eps: float, out: Tensor, follow: Follow = Follow.WAIT_FIRST
    ) -> None:
        """residual [T, H] += y in place, rounded; out [T, H] = rms_norm(residual) * weight [H]."""
        self._add_rms_norm(product.y, product.bias, *self._lora(product), residual, weight, eps, int(follow), out)

    def rope_kv_write(
        self,
        product: Product,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        kv_slots: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        q: Tensor,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
        follow: Follow = Follow.WAIT_FIRST,
    ) -> None:
        """Norm q and k per head where asked, rotate, write k and v into the cache and q out.

        Args:
            product: [P, T, (heads + 2 G) D].
            cos, sin: [positions, D / 2] float32.
            positions, kv_slots: [T] int32. A row of negative kv_slots writes no key and no value (padding).
            key_cache, value_cache: [blocks, block_size, G, D], any strides but the last (1); written.
            q: [T, heads D], written.
            q_norm, k_norm: [D] or None.
        """
        self._rope_kv_write(
            product.y,
            product.bias,
            *self._lora(product),
            cos,
            sin,
            positions,
            kv_slots,
            key_cache,
            value_cache,
            q_norm,
            k_norm,
            eps,
            int(follow),
            q,
        )

    def materialize(self, product: Product, out: Tensor, follow: Follow = Follow.WAIT_FIRST) -> None:
        """out [T, N] = y, in float32 (logits) or the model's type."""
        self._materialize(product.y, product.bias, *self._lora(product), int(follow), out)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor, follow: Follow = Follow.WAIT_FIRST) -> None:
        """out [T, H] = weight * x / sqrt(mean(x^2) + eps)."""
        self._rms_norm(x, weight, eps, int(follow), out)

    def embed_rms_norm(
        self,
        token_ids: Tensor,
        embedding: Tensor,
        weight: Tensor,
        eps: float,
        residual: Tensor,
        out: Tensor,
        sources: Tensor | None = None,
        follow: Follow = Follow.PLAIN,
    ) -> None:
        """residual [T, H] = embedding[token_ids[sources]]; out [T, H] = rms_norm(residual).

        Args:
            token_ids: [T] int32 or int64; any number where `sources` says which. A row whose id is negative is left alone.
            sources: [T] int32; None: row t's is the t-th.
        """
        self._embed_rms_norm(token_ids, sources, embedding, weight, eps, int(follow), residual, out)

    def take_rows(self, x: Tensor, rows: Tensor, out: Tensor, follow: Follow = Follow.WAIT_FIRST) -> None:
        """out [W, H] = x[rows]. rows: [W] int32; H: whole 16 bytes."""
        self._take_rows(x, rows, int(follow), out)

    def skinny_gemm_planes(self, outputs: int, inputs: int, tokens: int) -> int:
        """S of the planes that `skinny_gemm` writes for these shapes; 0 where it cannot run them."""
        return int(self._skinny_gemm_planes(outputs, inputs, tokens))

    def is_skinny_gemm_faster(self, outputs: int, inputs: int, tokens: int, *, has_adapters: bool = False) -> bool:
        """Whether `skinny_gemm` beats cuBLAS in a step on an H100, as measured; it may still be able to run where not."""
        return bool(self._is_skinny_gemm_faster(outputs, inputs, tokens, has_adapters))

    def skinny_gemm(self, x: Tensor, weight: Tensor, y: Tensor, follow: Follow = Follow.WAIT_FIRST) -> None:
        """y [S, T, N] of x [T, K] and weight [N, K], float32, or bfloat16, every plane rounded. Hopper only."""
        self._skinny_gemm(x, weight, follow != Follow.PLAIN, y)

    def skinny_gemm_silu_mul(self, x: Tensor, weight: Tensor, out: Tensor, follow: Follow = Follow.WAIT_FIRST) -> None:
        """out [T, N / 2] bfloat16 = silu(gate) * up of x [T, K] and weight [N, K], gate first; S must be 1. Hopper only."""
        self._skinny_gemm_silu_mul(x, weight, follow != Follow.PLAIN, out)

    def skinny_gemm_logits(
        self, x: Tensor, weight: Tensor, wanted: Tensor, y: Tensor, parts: Tensor, follow: Follow = Follow.WAIT_FIRST
    ) -> None:
        """`skinny_gemm` into y [T, N] float32, written where a row is wanted, and the largest of every row; S must be 1.

        Args:
            wanted: [T] int32, not 0 where a row of y is written.
            parts: [T, `skinny_gemm_parts`, 2] int32, written: the largest of each part of the row (float32 bits; NaN where one
                is) and its lowest column among equals, which means nothing where the largest is not finite.
        """
        self._skinny_gemm_logits(x, weight, wanted, follow != Follow.PLAIN, y, parts)

    def skinny_gemm_parts(self, outputs: int, inputs: int) -> int:
        """Parts of a row whose largest `skinny_gemm_logits` tells."""
        return int(self._skinny_gemm_parts(outputs, inputs))

    def _lora(self, product: Product) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, tuple[int, ...], int]:
        tiles = product.tiles
        if tiles is None:
            return None, None, None, None, (), 0
        return self._pages, tiles.block, self._ranks, product.v, product.spans, tiles.tile_rows
