"""Every operation of `node.kernels.ops` in plain torch: the compiled kernels' measure, and the way without a compiler.

Semantics are the contract of both paths: sums in float32 (float64 inputs stay float64, for tests), one rounding to the
model's dtype at the end. Speed is no goal here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from node.kernels.lora import LoraPool, LoraRows


def _wide(x: Tensor) -> Tensor:
    """float32 for everything narrower, float64 unchanged."""
    return x if x.dtype == torch.float64 else x.float()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """y = x W^T + bias. x: [T, H]; weight: [O, H]; bias: [O] or None; returns [T, O] in `out_dtype`."""
    y = _wide(x) @ _wide(weight).T
    if bias is not None:
        y = y + _wide(bias)
    return y.to(out_dtype)


def linear_by_row(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`linear` one row at a time: a row's bits never depend on the rows beside it."""
    if x.shape[0] == 0:
        return x.new_empty((0, weight.shape[0]), dtype=out_dtype)
    return torch.cat([linear(x[i : i + 1], weight, bias, out_dtype) for i in range(x.shape[0])])


def lora_delta(x: Tensor, pool: LoraPool, rows: LoraRows, spans: Tensor, out_columns: int) -> Tensor:
    """Sum of every row's own adapters. x: [T, H]; spans: see `LoraSpans.table`; returns [T, out_columns] float32 (or float64).

    Semantics: delta[t, column + o] = sum over terms (s, w) of row t: w * scale[m, s] * (x[t] A_s^T) B_s.
    """
    wide = _wide(x)
    delta = wide.new_zeros((x.shape[0], out_columns))
    starts, slots = rows.row_start.tolist(), rows.slot.tolist()
    modules = spans.tolist()
    for row in range(x.shape[0]):
        for term in range(starts[row], starts[row + 1]):
            for module in modules:
                _add_term(delta[row], wide[row], pool, slots[term], rows.weight[term], module)
    return delta


def _add_term(delta: Tensor, x: Tensor, pool: LoraPool, slot: int, weight: Tensor, module: list[int]) -> None:
    index, a_offset, b_offset, inputs, outputs, column = module
    rank = int(pool.ranks[index, slot])
    scale = (weight * pool.scales[index, slot]).to(x.dtype)
    for page_index in range(-(-rank // pool.page_rank)):
        page = pool.pages[int(pool.slot_pages[slot, page_index])]
        count = min(pool.page_rank, rank - page_index * pool.page_rank)
        a = page[a_offset : a_offset + count * inputs].view(count, inputs).to(x.dtype)
        b = page[b_offset : b_offset + count * outputs].view(count, outputs).to(x.dtype)
        delta[column : column + outputs] += (scale * (a @ x)) @ b


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis. x: [..., H]; weight: [H]; returns x's shape and dtype."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * _wide(weight)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x (rounded to its dtype, in place), then `rms_norm` of the rounded residual. Shapes: [T, H]."""
    residual.copy_((_wide(residual) + _wide(x)).to(residual.dtype))
    return rms_norm(residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up: [T, 2 I], gate first; returns [T, I]."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation. x: [T, heads, D]; cos, sin: [T, 1, D / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_kv_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Split qkv [T, (heads + 2 G) D], norm q and k per head where asked, rotate, write k and v; return q [T, heads D]."""
    _, groups, block, size = key_cache.shape
    heads = qkv.shape[1] // size - 2 * groups
    q, k, v = _wide(qkv).view(-1, heads + 2 * groups, size).tensor_split((heads, heads + groups), dim=1)
    q = q if q_norm is None else rms_norm(q, q_norm, eps)
    k = k if k_norm is None else rms_norm(k, k_norm, eps)
    row_cos, row_sin = cos[positions].to(q.dtype).unsqueeze(1), sin[positions].to(q.dtype).unsqueeze(1)
    blocks, offsets = kv_slots // block, kv_slots % block
    key_cache[blocks, :, offsets] = _rotate(k, row_cos, row_sin).to(key_cache.dtype)
    value_cache[blocks, :, offsets] = v.to(value_cache.dtype)
    return _rotate(q, row_cos, row_sin).to(qkv.dtype).reshape(qkv.shape[0], heads * size)


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """Causal attention of each sequence's rows over its blocks. q: [T, heads D]; returns the same shape."""
    out = torch.empty_like(q)
    for first, last, keys, values in _sequences(key_cache, value_cache, block_tables, query_start, context_lens):
        out[first:last] = _attend(q[first:last], keys, values, scale, sliding_window).to(q.dtype)
    return out


def paged_attention_by_row(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """`paged_attention` one row at a time, each over the keys it sees: the same bits in a chunk of any size and in decode."""
    out = torch.empty_like(q)
    for first, last, keys, values in _sequences(key_cache, value_cache, block_tables, query_start, context_lens):
        for row in range(first, last):
            seen = keys.shape[1] - (last - 1 - row)
            attended = _attend(q[row : row + 1], keys[:, :seen], values[:, :seen], scale, sliding_window)
            out[row : row + 1] = attended.to(q.dtype)
    return out


def _sequences(
    key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, query_start: Tensor, context_lens: Tensor
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """For each sequence: its first row, the row after its last, and its keys and values [G, context, D]."""
    starts = query_start.tolist()
    for sequence, context in enumerate(context_lens.tolist()):
        keys = _gather(key_cache, block_tables[sequence], context)
        values = _gather(value_cache, block_tables[sequence], context)
        yield starts[sequence], starts[sequence + 1], keys, values


def _gather(cache: Tensor, table: Tensor, context: int) -> Tensor:
    """[blocks, G, B, D] and a block list -> [G, context, D]."""
    _, groups, block, size = cache.shape
    blocks = cache[table[: -(-context // block)].long()]
    return _wide(blocks).transpose(0, 1).reshape(groups, -1, size)[:, :context]


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, sliding_window: int | None) -> Tensor:
    groups, context, size = keys.shape
    count = q.shape[0]
    queries = _wide(q).view(count, groups, -1, size).permute(1, 2, 0, 3)
    scores = torch.einsum("ghqd,gkd->ghqk", queries, keys) * scale
    position = torch.arange(context - count, context, device=q.device).unsqueeze(1)
    key_position = torch.arange(context, device=q.device).unsqueeze(0)
    hidden = key_position > position
    if sliding_window is not None:
        hidden = hidden | (key_position <= position - sliding_window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("ghqk,gkd->qghd", weights, values).reshape(count, -1)
