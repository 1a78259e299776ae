"""The decoder of the Llama, Mistral, Qwen2 and Qwen3 families.

Semantics, for each layer (2302.13971):
    h = rms_norm(x);  q, k, v = W_qkv h;  x += W_o attention(rope(q), rope(k), v)
    h = rms_norm(x);  x += W_down (silu(W_gate h) * W_up h)
and logits = W_head rms_norm(x). q, k, v share one matrix product, gate and up another. Every product adds each row's own
adapters (`node.kernels`).

Shape letters: T rows (tokens), W rows that want logits, H hidden, V vocabulary, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from node.kernels.lora import LoraPool
from node.kernels.ops import Kernels, LoraSpans, PackedLinear
from node.kernels.side import SideGroup, add_to_embedding, select_groups, side_linear
from node.models.inputs import KVCache, StepInputs


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """One product of several linear modules: packed weight, bias [O] or None, and the modules' places in an adapter page."""

    packed: PackedLinear
    bias: Tensor | None
    spans: LoraSpans


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
        self._head_module = int(weights.head.spans.table[0, 0])

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, kv: KVCache, pool: LoraPool | None) -> Tensor:
        """Run one step.

        Args:
            inputs: The step's rows. kv: written at `inputs.kv_slots`, read through `inputs.block_tables`.
            pool: Adapter memory; needed when `inputs.lora` is not None.

        Returns:
            [W, V] float32. Logits of `inputs.logit_rows`.
        """
        h = self.hidden(inputs, kv, pool)
        if inputs.hidden_rows is not None:
            inputs.hidden = h[inputs.hidden_rows].float()
        return self.logits(h, inputs, pool)

    @torch.inference_mode()
    def hidden(self, inputs: StepInputs, kv: KVCache, pool: LoraPool | None) -> Tensor:
        """The layers alone. Returns [T, H], what the output projection reads."""
        kernels, weights, lora, eps = self._kernels, self._weights, inputs.lora, self._weights.eps
        linear, add_rms_norm = kernels.linear, kernels.add_rms_norm

        def project(rows: Tensor, module: FusedLinear) -> Any:
            if inputs.side is not None and pool is not None:
                return kernels.unfinish(self._side_linear(rows, module, pool, lora, inputs.side))
            return linear(rows, module.packed, module.bias, pool=pool, rows=lora, spans=module.spans)

        def multiply_gate(rows: Tensor, module: FusedLinear) -> Tensor:
            if inputs.side is not None and pool is not None:
                return kernels.silu_mul(project(rows, module))
            return kernels.linear_silu_mul(rows, module.packed, module.bias, pool=pool, rows=lora, spans=module.spans)

        plan = kernels.plan_attention(
            inputs.block_tables,
            inputs.query_start,
            inputs.context_lens,
            inputs.max_query,
            inputs.max_context,
            is_short=inputs.is_short,
        )
        x, h = kernels.embed_rms_norm(inputs.token_ids, weights.embedding, weights.first_norm, eps)
        if inputs.side is not None and pool is not None:
            add_to_embedding(x, inputs.token_ids, pool, inputs.side)
            h = kernels.rms_norm(x, weights.first_norm, eps)
        for layer, keys, values in zip(weights.layers, kv.keys, kv.values, strict=True):
            q = kernels.rope_kv_write(
                project(h, layer.qkv),
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
            h = kernels.paged_attention(
                q, keys, values, inputs.block_tables, inputs.query_start, inputs.context_lens, weights.scale, layer.window, plan
            )
            h = add_rms_norm(project(h, layer.o), x, layer.post_attention_norm, eps)  # x += W_o attention
            h = multiply_gate(h, layer.gate_up)
            h = add_rms_norm(project(h, layer.down), x, layer.next_norm, eps)  # x += W_down (...)
        return h

    @torch.inference_mode()
    def logits(self, h: Tensor, inputs: StepInputs, pool: LoraPool | None) -> Tensor:
        """Project the wanted rows of h [T, H] on the vocabulary. Returns [W, V] float32."""
        kernels, head, wanted = self._kernels, self._weights.head, inputs.logit_rows
        if wanted is not None and wanted.numel() == 0:
            return torch.empty((0, head.packed.out_features), dtype=torch.float32, device=h.device)
        rows = kernels.head_rows(inputs.lora, pool, wanted, self._head_module)
        x = h if wanted is None else h[wanted]
        if inputs.side is not None and pool is not None:
            groups = inputs.side if wanted is None else select_groups(inputs.side, wanted)
            return self._side_linear(x, head, pool, rows, groups or (), torch.float32)
        return kernels.logits(x, head.packed, head.bias, pool=pool, rows=rows, spans=head.spans, tops=inputs.tops)

    def _side_linear(
        self,
        x: Tensor,
        module: FusedLinear,
        pool: LoraPool,
        rows: Any,
        groups: Sequence[SideGroup],
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A product in a step with rows whose adapters have more than pages hold."""
        return side_linear(
            self._kernels,
            x,
            module.packed,
            module.bias,
            pool=pool,
            rows=rows,
            groups=groups,
            spans=module.spans,
            out_dtype=out_dtype,
        )

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
