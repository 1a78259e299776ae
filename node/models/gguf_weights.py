"""A GGUF file's tensors under transformers' names and in transformers' order of rows."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from node.models.gguf_file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"  # kept under its own name: transformers has no such tensor
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    ROPE_FACTORS: ROPE_FACTORS,
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PROJECTION = re.compile(r".*\.self_attn\.([qk])_proj\.(weight|bias)")


class GgufWeights:
    """Reads a GGUF file as if it were the transformers checkpoint it was made from.

    llama.cpp stores the queries and keys of its "llama" architecture with the rows of each head permuted, because it rotates
    neighbouring dimensions where transformers rotates halves; `read` undoes that.

    Args:
        file: The parsed file.
        head_count, kv_head_count: Heads of queries and of keys.
    """

    def __init__(self, file: GgufFile, head_count: int, kv_head_count: int) -> None:
        self._file = file
        self._names = {_transformers_name(name): name for name in file.tensors}
        is_permuted = file.metadata.get("general.architecture") == "llama"
        self._permuted_heads = {"q": head_count, "k": kv_head_count} if is_permuted else {}

    def names(self) -> frozenset[str]:
        """Every tensor; those without a counterpart in transformers keep llama.cpp's name."""
        return frozenset(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in torch's order."""
        return self._file.tensors[self._names[name]].shape

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Dequantise one tensor and restore its rows."""
        tensor = self._file.read(self._names[name], dtype)
        projection = _PROJECTION.fullmatch(name)
        heads = self._permuted_heads.get(projection[1]) if projection else None
        return tensor if heads is None else _halves(tensor, heads)


def _transformers_name(name: str) -> str:
    block = _BLOCK.fullmatch(name)
    if block and block[2] in _LAYER:
        return f"model.layers.{block[1]}.{_LAYER[block[2]]}.{block[3]}"
    return _TOP.get(name, name)


def _halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from (0, d/2, 1, d/2 + 1, ...) back to (0, 1, ..., d - 1). tensor: [heads * d, ...]."""
    pairs = tensor.view(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
