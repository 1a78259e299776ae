"""Paged prefill in Triton: prompt chunks at the end of their contexts, decode rows among them.

A program owns `ROWS` rows of one sequence with all query heads of one key/value head, so that keys and values are read once for
all of them, and walks the context in tiles of keys. Fixed chunks of keys join as in decode, so a row has the same bits in both
where both run on tiles of the same shape.
"""

from __future__ import annotations

import triton
import triton.language as tl

from node.kernels.attention.triton_math import attend_tile, finish, join_chunks, place_tile


@triton.jit(do_not_specialize=["window"])
def prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tables_ptr,
    starts_ptr,  # [Q + 1] int32
    lens_ptr,  # [Q] int32
    scale_log2,
    window,  # 0: none
    q_stride,
    out_stride,
    table_stride,
    block_stride,
    token_stride,
    PER_GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a program; ROWS x PER_GROUP <= M
    M: tl.constexpr,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,  # keys of a chunk that is reduced on its own; 0: all
    STAGES: tl.constexpr,
):
    group = tl.program_id(0)
    sequence = tl.program_id(1)
    # Late rows see the most keys: they start first, so that no long program begins at the end.
    part = tl.num_programs(2) - 1 - tl.program_id(2)
    first_row = tl.load(starts_ptr + sequence)
    rows = tl.load(starts_ptr + sequence + 1) - first_row
    if part * ROWS >= rows:
        return
    context = tl.load(lens_ptr + sequence)
    lane = tl.arange(0, M)
    row = part * ROWS + lane // PER_GROUP
    is_row = (lane // PER_GROUP < ROWS) & (row < rows)
    position = tl.where(is_row, context - rows + row, -1)
    head = group * PER_GROUP + lane % PER_GROUP
    dim = tl.arange(0, D)
    is_dim = dim < HEAD
    flat = (first_row + row).to(tl.int64)
    q_where = flat[:, None] * q_stride + head[:, None] * HEAD + dim[None, :]
    q = tl.load(q_ptr + q_where, mask=is_row[:, None] & is_dim[None, :], other=0.0)

    first_position = context - rows + part * ROWS
    end = tl.minimum(context, first_position + ROWS)
    low = tl.where(window > 0, tl.maximum(first_position - window + 1, 0), 0)
    oldest = tl.where(window > 0, position - window, -1)
    acc = tl.zeros([M, D], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    if CHUNK == 0:
        acc, top, total = _walk(
            q, k_ptr, v_ptr, tables_ptr + sequence * table_stride, group, (low // TILE) * TILE, end, end, position, oldest, dim,
            is_dim, acc, top, total, scale_log2, block_stride, token_stride, HEAD, BLOCK, TILE, STAGES,
        )  # fmt: skip
    else:
        for cut in range((low // CHUNK) * CHUNK, end, CHUNK):
            more = tl.zeros([M, D], tl.float32)
            more_top = tl.full([M], float("-inf"), tl.float32)
            more_total = tl.zeros([M], tl.float32)
            more, more_top, more_total = _walk(
                q, k_ptr, v_ptr, tables_ptr + sequence * table_stride, group, tl.maximum(cut, (low // TILE) * TILE),
                tl.minimum(cut + CHUNK, end), end, position, oldest, dim, is_dim, more, more_top, more_total, scale_log2,
                block_stride, token_stride, HEAD, BLOCK, TILE, STAGES,
            )  # fmt: skip
            acc, top, total = join_chunks(acc, top, total, more, more_top, more_total)
    out_where = flat[:, None] * out_stride + head[:, None] * HEAD + dim[None, :]
    tl.store(out_ptr + out_where, finish(acc, total), mask=is_row[:, None] & is_dim[None, :])


@triton.jit
def _walk(
    q, k_ptr, v_ptr, table_ptr, group, begin, stop, end, position, oldest, dim, is_dim, acc, top, total, scale_log2,
    block_stride, token_stride,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Reduce the keys begin..stop. position, oldest: [M], the last key that a row sees and the last one before its window."""
    for start in tl.range(begin, stop, TILE, num_stages=STAGES):
        key = start + tl.arange(0, TILE)
        exists = key < end
        base, offset = place_tile(table_ptr, start, end, block_stride, token_stride, BLOCK, TILE)
        k_here, v_here = k_ptr + base + group * HEAD, v_ptr + base + group * HEAD
        k = tl.load(k_here + offset[None, :] + dim[:, None], mask=exists[None, :] & is_dim[:, None], other=0.0)
        v = tl.load(v_here + offset[:, None] + dim[None, :], mask=exists[:, None] & is_dim[None, :], other=0.0)
        is_seen = (key[None, :] <= position[:, None]) & (key[None, :] > oldest[:, None])
        acc, top, total = attend_tile(q, k, v, is_seen, acc, top, total, scale_log2)
    return acc, top, total
