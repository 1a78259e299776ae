"""What some adapters change that rank pages cannot hold: DoRA's gains, biases of lora_B, and the embedding.

A step pays for this only when one of its rows uses such an adapter: `side_rows` is None otherwise. The rows that do are computed
apart from the others, so that no row's bits depend on its neighbours.

Semantics of one linear module, over the terms (weight w, gain g, bias c, factors A and B, scale s) of a row:
    y = W x + b + sum of w * ((g - 1) * (W x) + g * s * (B (A x) + c))
With one term of weight 1 that is DoRA (2402.09353) as PEFT computes it: b + g * (W x + s B A x). B in the pages is g * B already.

Shape letters: T rows of the step, R rows with side tensors, O outputs, H hidden, V vocabulary, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from node.kernels.lora import LoraPool, LoraRows, lora_rows
from node.kernels.ops import Kernels, LoraSpans, PackedLinear

Terms = tuple[tuple[int, float], ...]  # (slot, weight), in recipe order


@dataclass(frozen=True, slots=True)
class SideGroup:
    """Rows of one recipe. rows: [R] int64, ascending. lora: the terms of these rows alone."""

    rows: Tensor
    terms: Terms
    lora: LoraRows


def side_rows(pool: LoraPool, terms: Sequence[Terms], counts: Sequence[int]) -> tuple[SideGroup, ...] | None:
    """Group the rows whose adapters have side tensors; None, at the price of a look-up in an empty table, when there are none.

    Args:
        terms: Of each sequence. counts: Consecutive rows of each sequence.
    """
    if not pool.sides:
        return None
    found: dict[Terms, list[int]] = {}
    first = 0
    for sequence_terms, count in zip(terms, counts, strict=True):
        if any(slot in pool.sides for slot, _ in sequence_terms):
            found.setdefault(tuple(sequence_terms), []).extend(range(first, first + count))
        first += count
    return tuple(_group(recipe, rows, pool.pages.device) for recipe, rows in found.items()) or None


def _group(terms: Terms, rows: Sequence[int], device: torch.device) -> SideGroup:
    lora = lora_rows([terms], [len(rows)])
    if lora is None:
        raise ValueError("a group of side rows has no terms")
    lora.row_start, lora.slot, lora.weight = (t.to(device) for t in (lora.row_start, lora.slot, lora.weight))
    return SideGroup(torch.tensor(rows, dtype=torch.int64, device=device), terms, lora)


def select_groups(groups: Sequence[SideGroup], wanted: Tensor) -> tuple[SideGroup, ...] | None:
    """The groups over a selection of a step's rows. wanted: [W] int64; row i of the result's numbering is row wanted[i]."""
    selected = []
    for group in groups:
        rows = torch.isin(wanted, group.rows).nonzero().flatten()
        if rows.numel():
            selected.append(_group(group.terms, rows.tolist(), wanted.device))
    return tuple(selected) or None


def add_to_embedding(x: Tensor, token_ids: Tensor, pool: LoraPool, groups: Sequence[SideGroup]) -> None:
    """Change the embedded rows of adapters that adapt the embedding. x: [T, H], in place; token_ids: [T] int64."""
    for group in groups:
        deltas = [(weight, pool.sides[slot].embedding) for slot, weight in group.terms if slot in pool.sides]
        used = [(weight, delta) for weight, delta in deltas if delta is not None]
        if not used:
            continue
        base = x[group.rows].float()
        y = base.clone()
        for weight, delta in used:
            if delta.gain is not None:
                y += base * (weight * delta.gain)
            y += weight * _by_row(delta.a[token_ids[group.rows]].float(), delta.b)
        x[group.rows] = y.to(x.dtype)


def _by_row(a: Tensor, b: Tensor) -> Tensor:
    """a b^T one row at a time on the CPU, where a product's bits depend on its number of rows. a: [R, r]; b: [H, r]."""
    if a.device.type != "cpu":
        return a @ b.T
    return torch.stack([torch.mv(b, row) for row in a])


def side_linear(
    kernels: Kernels[Any, Any],
    x: Tensor,
    packed: PackedLinear,
    bias: Tensor | None,
    *,
    pool: LoraPool,
    rows: Any,
    groups: Sequence[SideGroup],
    spans: LoraSpans,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`Kernels.linear`, finished, of a step in which some rows follow the semantics above. Those are computed by themselves.

    Args:
        x: [T, H]. bias: [O] or None. rows: the adapters of all rows, as for `Kernels.linear`.
        groups: Of `side_rows`. out_dtype: Defaults to x's.

    Returns:
        [T, O].
    """
    modules = spans.table.tolist()
    sums = [
        (group, _sum(group, pool, modules, packed, "gains"), _sum(group, pool, modules, packed, "biases")) for group in groups
    ]
    touched = [item for item in sums if item[1] is not None or item[2] is not None]
    count, dtype = x.shape[0], out_dtype or x.dtype
    if len(touched) == 1 and touched[0][0].rows.numel() == count:  # all rows, in order
        return _group_linear(kernels, x, packed, bias, pool, spans, *touched[0]).to(dtype)
    if sum(group.rows.numel() for group, _, _ in touched) < count:
        y = kernels.finish(kernels.linear(x, packed, bias, pool=pool, rows=rows, spans=spans, out_dtype=out_dtype), dtype)
    else:
        y = x.new_empty((count, packed.out_features), dtype=dtype)
    for group, gain, offset in touched:
        y[group.rows] = _group_linear(kernels, x[group.rows], packed, bias, pool, spans, group, gain, offset).to(dtype)
    return y


def _group_linear(
    kernels: Kernels[Any, Any],
    x: Tensor,
    packed: PackedLinear,
    bias: Tensor | None,
    pool: LoraPool,
    spans: LoraSpans,
    group: SideGroup,
    gain: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """The rows of one group, [R, O] float32. x: [R, H]."""
    y = kernels.finish(kernels.linear(x, packed, out_dtype=torch.float32), torch.float32)
    if gain is not None:
        y *= 1 + gain
    if bias is not None:
        y += bias
    if offset is not None:
        y += offset
    kernels.sgmv(y, x, pool, group.lora, spans)
    return y


def _sum(group: SideGroup, pool: LoraPool, modules: list[list[int]], packed: PackedLinear, kind: str) -> Tensor | None:
    """The weighted sum of the terms' gains or biases over the columns of a fused linear, [O]; None when all are absent."""
    total: Tensor | None = None
    for slot, weight in group.terms:
        side = pool.sides.get(slot)
        if side is None:
            continue
        vectors: Mapping[int, Tensor] = getattr(side, kind)
        for index, _, _, _, outputs, column in modules:
            vector = vectors.get(index)
            if vector is None:
                continue
            if total is None:
                total = torch.zeros(packed.out_features, dtype=torch.float32, device=vector.device)
            total[column : column + outputs].add_(vector, alpha=weight)
    return total
