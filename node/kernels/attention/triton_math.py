"""The arithmetic that the decode and the prefill kernel share, so that a row has the same bits in both.

Scores are in units of log2, because the GPU's exponential is 2^x. A chunk of keys is reduced to (sum of weights x values, largest
score, sum of weights); chunks join in ascending order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_tile(q, k, v, seen, acc, top, total, scale_log2):
    """One online-softmax step over a tile of keys.

    q: [M, D]; k: [D, K]; v: [K, D]; seen: [M, K] bool; acc: [M, D] float32; top, total: [M] float32. `top` starts at -inf.
    """
    scores = tl.dot(q, k, input_precision="ieee") * scale_log2
    scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet keeps -inf; subtracting it from itself would be NaN.
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - safe_top[:, None])
    shrink = tl.exp2(top - safe_top)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new_top, total


@triton.jit
def join_chunks(acc, top, total, more_acc, more_top, more_total):
    """Add a later chunk of keys to earlier ones. acc: [M, D]; top, total: [M]; all float32."""
    new_top = tl.maximum(top, more_top)
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    left = tl.exp2(top - safe_top)
    right = tl.exp2(more_top - safe_top)
    return acc * left[:, None] + more_acc * right[:, None], new_top, total * left + more_total * right


@triton.jit
def finish(acc, total):
    """Weighted mean [M, D]; 0 for a row that saw no key."""
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def place_tile(table_ptr, start, end, block_stride, token_stride, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Where a tile's keys lie in the cache: a base and an offset for each of them; keys at or after `end` stay in block 0.

    A tile inside one block has one base and offsets that never change, so that the addresses cost one addition a load.
    """
    lane = tl.arange(0, TILE)
    if BLOCK % TILE == 0:
        block = tl.load(table_ptr + start // BLOCK).to(tl.int64)
        return block * block_stride + (start % BLOCK) * token_stride, lane * token_stride
    else:  # noqa: RET505 - a branch of the compiler
        key = start + lane
        blocks = tl.load(table_ptr + key // BLOCK, mask=key < end, other=0).to(tl.int64)
        return tl.zeros([], tl.int64), blocks * block_stride + (key % BLOCK) * token_stride
