"""From a checkpoint's tensors to the decoder's packed weights, one layer at a time.

Peak memory is the packed model plus one fused matrix: each tensor is read, joined with its neighbours, packed and dropped. On a
GPU, where packing changes nothing, joined matrices are filled in place by threads while others go on (`node.models.placement`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from node.errors import ModelLoadError
from node.kernels.layout import PageLayout
from node.kernels.ops import Kernels, lora_spans
from node.models.decoder import DecoderLayer, DecoderWeights
from node.models.gguf_weights import ROPE_FACTORS
from node.models.linears import FusedLinear
from node.models.placement import Part, Placement
from node.models.rope import rope_tables
from node.models.spec import ModelSpec
from node.models.weights import Weights, read_checked

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head"
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)  # older checkpoints stored what the configuration already says


def decoder_weights(
    spec: ModelSpec,
    weights: Weights,
    placement: Placement,
    dtype: torch.dtype,
    kernels: Kernels[Any, Any],
    layout: PageLayout,
) -> DecoderWeights:
    """Read, fuse and pack every weight. They are complete when the placement is finished.

    Args:
        spec: What the checkpoint must hold.
        weights: The checkpoint.
        placement: Reads them.
        dtype: float32 or bfloat16, of weights and activations.
        kernels: Packs the matrices for itself.
        layout: Where each linear module lies in an adapter page.

    Raises:
        ModelLoadError: model_corrupt. A tensor is missing or has another shape; model_unsupported: one that no rule uses.
    """
    reader = _Reader(spec, weights, placement, dtype, kernels, layout)
    first_norms = [reader.vector(f"model.layers.{layer}.input_layernorm.weight") for layer in range(spec.layer_count)]
    next_norms = [*first_norms[1:], reader.vector("model.norm.weight")]
    layers = tuple(_layer(reader, spec, layer, next_norms[layer]) for layer in range(spec.layer_count))
    embedding = reader.matrix(_EMBEDDING, (spec.vocab_size, spec.hidden_size))
    head = reader.head(embedding)
    reader.refuse_unused()
    cos, sin = (table.to(kernels.device) for table in rope_tables(spec.rope, spec.max_model_len, reader.rope_factors()))
    return DecoderWeights(embedding, first_norms[0], layers, head, cos, sin, spec.rms_norm_eps, spec.head_dim**-0.5)


def _layer(reader: _Reader, spec: ModelSpec, layer: int, next_norm: Tensor) -> DecoderLayer:
    attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
    hidden, inter = spec.hidden_size, spec.intermediate_size
    qkv = [(attention + "q_proj", spec.q_size), (attention + "k_proj", spec.kv_size), (attention + "v_proj", spec.kv_size)]
    return DecoderLayer(
        qkv=reader.fused(qkv, hidden, spec.has_qkv_bias, attention + "qkv_proj" if spec.has_fused_weights else None),
        q_norm=reader.vector(attention + "q_norm.weight", spec.head_dim) if spec.has_qk_norm else None,
        k_norm=reader.vector(attention + "k_norm.weight", spec.head_dim) if spec.has_qk_norm else None,
        window=spec.windows[layer],
        o=reader.fused([(attention + "o_proj", hidden)], spec.q_size, spec.has_o_bias),
        post_attention_norm=reader.vector(f"model.layers.{layer}.post_attention_layernorm.weight"),
        gate_up=reader.fused(
            [(mlp + "gate_proj", inter), (mlp + "up_proj", inter)],
            hidden,
            spec.has_mlp_bias,
            mlp + "gate_up_proj" if spec.has_fused_weights else None,
        ),
        down=reader.fused([(mlp + "down_proj", hidden)], inter, spec.has_mlp_bias),
        next_norm=next_norm,
    )


class _Reader:
    """Reads tensors in one dtype and remembers which, so that a tensor nobody asked for is noticed."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        placement: Placement,
        dtype: torch.dtype,
        kernels: Kernels[Any, Any],
        layout: PageLayout,
    ) -> None:
        self._spec = spec
        self._weights = weights
        self._placement = placement
        self._dtype = dtype
        self._kernels = kernels
        self._layout = layout
        self._used: set[str] = set()

    def matrix(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._joined([(name, shape)])

    def _joined(self, parts: list[Part]) -> Tensor:
        self._used.update(name for name, _ in parts)
        return self._placement.joined(parts, self._dtype)

    def vector(self, name: str, size: int | None = None) -> Tensor:
        return self.matrix(name, (size or self._spec.hidden_size,))

    def fused(
        self, modules: list[tuple[str, int]], in_features: int, has_bias: bool, stored_as: str | None = None
    ) -> FusedLinear:
        """Join modules that read the same input: (name, out_features) pairs, in output order.

        `stored_as` names the one matrix that a checkpoint has of all of them.
        """
        stored = modules if stored_as is None else [(stored_as, sum(size for _, size in modules))]
        bias = self._joined([(name + ".bias", (size,)) for name, size in stored]) if has_bias else None
        weight = self._joined([(name + ".weight", (size, in_features)) for name, size in stored])
        columns = [sum(size for _, size in modules[:index]) for index in range(len(modules))]
        spans = lora_spans([(self._layout.spans[name], column) for (name, _), column in zip(modules, columns, strict=True)])
        return FusedLinear(self._kernels.pack_linear(weight), bias, spans)

    def head(self, embedding: Tensor) -> FusedLinear:
        """The output projection: its own tensor, or the embedding where the two are tied."""
        if not self._spec.is_tied:
            return self.fused([(_HEAD, self._spec.vocab_size)], self._spec.hidden_size, has_bias=False)
        self._used.add(_HEAD + ".weight")  # a tied checkpoint may store the copy
        return FusedLinear(self._kernels.pack_linear(embedding), None, lora_spans([(self._layout.spans[_HEAD], 0)]))

    def rope_factors(self) -> Tensor | None:
        """Divisors of the rotation's frequencies, as GGUF files of Llama 3 carry them."""
        if ROPE_FACTORS not in self._weights.names():
            return None
        return read_checked(self._weights, ROPE_FACTORS, (self._spec.head_dim // 2,), torch.float32)

    def refuse_unused(self) -> None:
        """A tensor that no rule uses means that this is not the model we take it for."""
        strangers = self._weights.names() - self._used - {ROPE_FACTORS}
        unused = sorted(name for name in strangers if not name.endswith(_IGNORED_SUFFIXES))
        if unused:
            shown = ", ".join(unused[:4])
            raise ModelLoadError(
                f"the checkpoint has {len(unused)} tensors that a {self._spec.architecture} model does not use ({shown}); "
                "it is a variant that this node does not support"
            )
