"""The LoRA arguments of one step, shared by the torch reference and the compiled kernels.

Shape letters: T rows (tokens), N (row, adapter) terms of the step, S slots, P pages, M modules of the model, R page rank,
O outputs, H hidden, V vocabulary, r rank of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EmbeddingDelta:
    """E[t] becomes (1 + gain) * E[t] + a[t] b, all in float32.

    Attributes:
        a: [V, r] in the pages' dtype. b: [H, r] float32, scale and gain multiplied in. gain: [H] float32, g - 1, or None.
    """

    a: Tensor
    b: Tensor
    gain: Tensor | None


@dataclass(frozen=True, slots=True)
class SideTensors:
    """One adapter's tensors beside its pages (`node.kernels.side`), on the pages' device, by module index (`ModuleSpan.index`).

    Attributes:
        gains: [O] float32, g - 1. biases: [O] float32, g * s * c.
        embedding: None where the adapter leaves the embedding alone.
    """

    gains: Mapping[int, Tensor] = field(default_factory=dict)
    biases: Mapping[int, Tensor] = field(default_factory=dict)
    embedding: EmbeddingDelta | None = None


@dataclass(slots=True)
class LoraPool:
    """Adapter memory and the tables that say which slot owns which pages. Owned and mutated by `node.adapters` only.

    Attributes:
        pages: [P, page_elements] float32 or bfloat16. See `PageLayout` for the order inside a page.
        slot_pages: [S, max_pages_per_slot] int32. Page numbers of a slot in rank order; unused entries are -1.
        ranks: [M, S] int32. Rank of module m in slot s; 0 where the adapter does not touch the module.
        scales: [M, S] float32. alpha / r, alpha / sqrt(r) for rsLoRA, per module.
        page_rank: R.
        halfway: Called between the layers of a step, before the first of the second half; None where nobody wants to know.
        sides: What pages cannot hold, by slot, of the few adapters that have such a thing; see `node.kernels.side`.
    """

    pages: Tensor
    slot_pages: Tensor
    ranks: Tensor
    scales: Tensor
    page_rank: int
    sides: dict[int, SideTensors] = field(default_factory=dict)
    halfway: Callable[[], None] | None = None


@dataclass(slots=True)
class LoraRows:
    """Which adapters each row of the step uses: a compressed sparse row list of (slot, weight) terms.

    Attributes:
        row_start: [T + 1] int32. Terms of row t are row_start[t] .. row_start[t + 1] - 1, in recipe order.
        slot: [N] int32. Slot of each term.
        weight: [N] float32. Recipe weight of each term; the kernel multiplies it with the module's scale.
    """

    row_start: Tensor
    slot: Tensor
    weight: Tensor


def lora_rows(terms: Sequence[Sequence[tuple[int, float]]], counts: Sequence[int]) -> LoraRows | None:
    """The rows of sequences that have `counts[i]` consecutive rows with the (slot, weight) terms `terms[i]`.

    Filled with numpy: a torch call per field would cost more than the smallest layers of a decode step.

    Returns None when no row uses an adapter, so that a base-only step pays nothing for LoRA.
    """
    if not any(terms):
        return None
    row_start = np.zeros(sum(counts) + 1, dtype=np.int32)
    np.cumsum(np.repeat([len(sequence_terms) for sequence_terms in terms], counts), out=row_start[1:])
    slots: list[int] = []
    weights: list[float] = []
    for sequence_terms, count in zip(terms, counts, strict=True):
        slots.extend([slot for slot, _ in sequence_terms] * count)
        weights.extend([weight for _, weight in sequence_terms] * count)
    return LoraRows(
        row_start=torch.from_numpy(row_start),
        slot=torch.from_numpy(np.array(slots, dtype=np.int32)),
        weight=torch.from_numpy(np.array(weights, dtype=np.float32)),
    )
