"""Shapes and dtypes of the compiled operations, for torch's tracing and `torch.library.opcheck`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PANEL = 32  # output columns of a packed panel, csrc/cpu/dispatch.h


def _pack_linear(weight: Tensor) -> Tensor:
    panels = -(-weight.shape[0] // PANEL)
    if weight.dtype == torch.float32:
        return weight.new_empty((panels, weight.shape[1], PANEL))
    return weight.new_empty((panels, (weight.shape[1] + 1) // 2, PANEL, 2))


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, is_float: bool, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], out_features), dtype=torch.float32 if is_float else x.dtype)


def _sgmv(y: Tensor, *rest: Any) -> None:
    return None


def _like_first(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def _silu_mul(gate_up: Tensor, *rest: Any) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


def _rope_kv_write(qkv: Tensor, cos: Tensor, sin: Tensor, p: Tensor, s: Tensor, key_cache: Tensor, *rest: Any) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] - 2 * key_cache.shape[1] * key_cache.shape[3]))


FAKES: dict[str, Callable[..., Any]] = {
    "pack_linear": _pack_linear,
    "linear": _linear,
    "lora_linear": _linear,
    "sgmv": _sgmv,
    "rms_norm": _like_first,
    "add_rms_norm": _like_first,
    "silu_mul": _silu_mul,
    "rope_kv_write": _rope_kv_write,
    "paged_attention": _like_first,
}


# The CUDA operations write into tensors of the caller: there is no shape to tell.
CUDA_OPS = (
    "lora_shrink",
    "fused_silu_mul",
    "fused_add_rms_norm",
    "fused_rope_kv_write",
    "materialize",
    "rms_norm_into",
    "embed_rms_norm",
    "take_rows",
    "skinny_gemm",
    "skinny_gemm_silu_mul",
    "skinny_gemm_logits",
    "attention_decode",
)


def _writes_only(*arguments: Any) -> None:
    return None


def register_cuda_fakes() -> None:
    """`register_fakes` for the CUDA library."""
    for name in CUDA_OPS:
        torch.library.register_fake(f"openlora::{name}", _writes_only, allow_override=True)


def register_fakes() -> None:
    """Tell torch the shapes of every operation. Call after the library is loaded; a second call replaces nothing."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"openlora::{name}", fake, allow_override=True)
