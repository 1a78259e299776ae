"""The decoder of the Llama, Mistral, Qwen2 and Qwen3 families.

Semantics, for each layer (2302.13971):
    h = rms_norm(x);  q, k, v = W_qkv h;  x += W_o attention(rope(q), rope(k), v)
    h = rms_norm(x);  x += W_down (silu(W_gate h) * W_up h)
and logits = W_head rms_norm(x). q, k, v share one matrix product, gate and up another. Every product adds each row's own
adapters (`node.kernels`).

Shape letters: T rows (tokens), W rows that want logits, H hidden, V vocabulary, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from node.kernels.lora import LoraPool
from node.kernels.ops import Kernels
from node.kernels.side import add_to_embedding
from node.models.inputs import Attended, KVCache, StepInputs
from node.models.linears import FusedLinear, Linears


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer. Norms are [H]; q_norm and k_norm are [D] or None; `window` counts tokens, None for all.

    `next_norm` is the norm that the following layer begins with (the final norm in the last layer): this layer's last
    addition and that norm are one operation.
    """

    qkv: FusedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int | None
    o: FusedLinear
    post_attention_norm: Tensor
    gate_up: FusedLinear
    down: FusedLinear
    next_norm: Tensor

    @property
    def linears(self) -> tuple[FusedLinear, ...]:
        """Every linear module of the layer."""
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """Everything the decoder computes with. embedding: [V, H]; first_norm: [H]; cos, sin: [positions, D / 2] float32."""

    embedding: Tensor
    first_norm: Tensor
    layers: tuple[DecoderLayer, ...]
    head: FusedLinear
    cos: Tensor
    sin: Tensor
    eps: float
    scale: float  # of the attention scores: D ** -0.5


class Decoder:
    """A `CausalLM`. Keeps nothing between calls but its weights, which `kernels` packed."""

    def __init__(self, weights: DecoderWeights, kernels: Kernels[Any, Any]) -> None:
        self._weights = weights
        self._kernels = kernels

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, kv: KVCache, pool: LoraPool | None) -> Tensor:
        """Run one step.

        Args:
            inputs: The step's rows. kv: written at `inputs.kv_slots`, read through `inputs.block_tables`.
            pool: Adapter memory; needed when `inputs.lora` is not None.

        Returns:
            [W, V] float32. Logits of `inputs.logit_rows`.
        """
        return self.logits(self.attended(inputs, kv, pool), inputs, pool)

    @torch.inference_mode()
    def attended(self, inputs: StepInputs, kv: KVCache, pool: LoraPool | None) -> Attended:
        """Everything up to the last layer's attention, behind which only the rows that want logits go on."""
        kernels, weights, eps = self._kernels, self._weights, self._weights.eps
        linears = Linears(kernels, pool, inputs.lora, inputs.side)
        x, h = kernels.embed_rms_norm(inputs.token_ids, weights.embedding, weights.first_norm, eps, sources=inputs.sources)
        plan = kernels.plan_attention(
            inputs.block_tables,
            inputs.query_start,
            inputs.context_lens,
            inputs.max_query,
            inputs.max_context,
            is_short=inputs.is_short,
        )
        if inputs.side is not None and pool is not None:
            add_to_embedding(x, inputs.row_token_ids(), pool, inputs.side)
            h = kernels.rms_norm(x, weights.first_norm, eps)
        half, last = len(weights.layers) // 2, weights.layers[-1]
        for index, (layer, keys, values) in enumerate(zip(weights.layers, kv.keys, kv.values, strict=True)):
            if index == half and inputs.lora is not None and pool is not None and pool.halfway is not None:
                pool.halfway()
            q = kernels.rope_kv_write(
                linears.product(h, layer.qkv),
                weights.cos,
                weights.sin,
                inputs.positions,
                inputs.kv_slots,
                keys,
                values,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                eps=eps,
            )
            attention = kernels.paged_attention(
                q, keys, values, inputs.block_tables, inputs.query_start, inputs.context_lens, weights.scale, layer.window, plan
            )
            if layer is not last:
                h = self._finish_layer(layer, attention, x, linears)
        wanted = inputs.logit_rows
        if wanted is not None:
            # The residual first: an `add_rms_norm` of a GPU reads it before it waits for the product behind these two.
            x, attention = kernels.take_rows(x, wanted), kernels.take_rows(attention, wanted)
        return Attended(attention, x)

    def _finish_layer(self, layer: DecoderLayer, attention: Tensor, x: Tensor, linears: Linears) -> Tensor:
        """What follows a layer's attention. x: [T, H], added to in place. Returns [T, H], which the next product reads."""
        add_rms_norm, eps = self._kernels.add_rms_norm, self._weights.eps
        h = add_rms_norm(linears.product(attention, layer.o), x, layer.post_attention_norm, eps)  # x += W_o attention
        h = linears.gated(h, layer.gate_up)
        return add_rms_norm(linears.product(h, layer.down), x, layer.next_norm, eps)  # x += W_down (...)

    @torch.inference_mode()
    def logits(self, attended: Attended, inputs: StepInputs, pool: LoraPool | None) -> Tensor:
        """Finish the last layer and project on the vocabulary. Returns [W, V] float32; `inputs.hidden` is written."""
        weights, (attention, x) = self._weights, attended
        if x.shape[0] == 0:
            return torch.empty((0, weights.head.packed.out_features), dtype=torch.float32, device=x.device)
        linears = Linears(self._kernels, pool, inputs.lora, inputs.side).of(inputs.logit_rows)
        h = self._finish_layer(weights.layers[-1], attention, x, linears)
        if inputs.hidden_rows is not None:
            inputs.hidden = h[inputs.hidden_rows].float()
        return linears.logits(h, weights.head, inputs.tops)

    # ---- BaseWeights, for what is computed once when an adapter is loaded

    def linear_weight(self, index: int) -> Tensor:
        """The weight [outputs, inputs] of one linear module, by its index in the page layout."""
        for module in (self._weights.head, *(m for layer in self._weights.layers for m in layer.linears)):
            for found, _, _, _, outputs, column in module.spans.table.tolist():
                if found == index:
                    return module.packed.unpacked(column, outputs)
        raise ValueError(f"the model has no linear module of index {index}")

    def embedding_weight(self) -> Tensor:
        """[V, H]."""
        return self._weights.embedding
