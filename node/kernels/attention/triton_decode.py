"""Paged decode in Triton: one row a sequence, the query heads of a key/value head together, keys split over programs.

A plan kernel (once a step) cuts the contexts into items of at most `chunk` tiles of 64 keys, whole ones first, so
that programs that take several end together. In the decode kernel a program takes items of one key/value head; the program that
finishes a sequence's last item joins all of them in ascending order, so the result does not depend on who came last. No second
launch, no order of arrival in the sums.

The chunk is chosen on the device so that the items fill the programs evenly; with a fixed chunk, a row's cuts depend on its own
context alone and its bits are the same in any batch.

Bytes: each key and value is read once; partial results add 4 (D + 2) bytes a query head and item.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from node.kernels.attention.triton_math import attend_tile, finish, join_chunks, place_tile

TILE = 64  # keys of one tile


@triton.jit
def name_blocks(record, tables_ptr, row, from_key, to_key, here, block, table_stride, HEADER: tl.constexpr, WIDTH: tl.constexpr):
    """Items [BATCH, WIDTH] with the cache blocks of their first keys."""
    field = tl.arange(0, WIDTH)[None, :]
    number = (from_key // block)[:, None] + field - HEADER
    is_block = here[:, None] & (field >= HEADER) & (number * block < to_key[:, None])
    blocks = tl.load(tables_ptr + row[:, None].to(tl.int64) * table_stride + number, mask=is_block, other=0)
    return tl.where(field >= HEADER, blocks, record)


@triton.jit(
    do_not_specialize=[
        "batch",
        "slots",
        "max_items",
        "fixed_chunk",
        "window",
        "start_tiles",
        "join_tiles",
        "block",
        "table_stride",
    ]
)
def plan_items_kernel(
    lens_ptr,  # [Q] int32
    starts_ptr,  # [Q + 1] int32, not read where CHUNK_TOKENS is 0
    tables_ptr,  # [Q, table_stride] int32
    items_ptr,  # [max_items, WIDTH] int32: see DecodeItems
    counts_ptr,  # [1 + Q] int32: items in all, then items of each sequence
    batch,
    slots,  # programs of one key/value head that run at once
    max_items,
    fixed_chunk,  # tiles; 0: choose
    window,  # 0: none
    start_tiles,  # what a program costs before its first key arrives, in tiles
    join_tiles,  # what it costs to join the items of a sequence that was cut
    block,  # tokens of a cache block
    table_stride,
    TILE: tl.constexpr,
    BATCH: tl.constexpr,
    CHUNKS: tl.constexpr,
    HEADER: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,  # rows of an item of a sequence with several; 0: every sequence has one
    USE_PDL: tl.constexpr,  # what it reads is older than the kernel before, beside which it runs
):
    if USE_PDL:
        gdc_launch_dependents()
    row = tl.arange(0, BATCH)
    context = tl.load(lens_ptr + row, mask=row < batch, other=0)
    if CHUNK_TOKENS > 0:
        query = tl.load(starts_ptr + row, mask=row < batch, other=0)
        rows = tl.load(starts_ptr + row + 1, mask=row < batch, other=0) - query
        length = tl.where(rows == 1, context, 0)
        pieces = tl.where(rows > 1, tl.cdiv(rows, CHUNK_TOKENS), 0)
        all_pieces = tl.sum(pieces, 0)
        slots = tl.maximum(slots - all_pieces, (slots + 3) // 4)
    else:
        query = row
        length = context
        all_pieces = 0
    low = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    begin = low // TILE
    end = tl.cdiv(length, TILE)
    if fixed_chunk > 0:
        chunk = fixed_chunk
    else:
        # Cost of a chunk size: rounds of programs x (tiles of a round + what a program costs besides).
        # Candidates grow by a fifth: 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, ..
        size = tl.ceil(tl.exp2(tl.arange(0, CHUNKS) * 0.25)).to(tl.int32)
        needed = tl.sum(tl.cdiv((end - begin)[None, :], size[:, None]), 1)
        most = tl.max(end - begin, 0)
        besides = tl.where(size < most, start_tiles + join_tiles, start_tiles)
        cost = tl.cdiv(needed, slots) * (tl.minimum(size, most) + besides) * 1024 + tl.minimum(needed, 1023)
        cost = tl.where(needed > max_items, 1 << 30, cost)
        chunk = tl.sum(tl.where(tl.arange(0, CHUNKS) == tl.argmin(cost, 0), size, 0), 0)
    # Cuts lie at multiples of the chunk from the sequence's start, not from the window's.
    first_cut = begin // chunk
    count = tl.where(length > 0, tl.cdiv(end, chunk) - first_cut, 0)
    first = tl.cumsum(count, 0) - count
    has_rest = ((end % chunk != 0) & (count > 0)).to(tl.int32)
    whole = count - has_rest
    first_whole = tl.cumsum(whole, 0) - whole
    rest = tl.sum(whole, 0) + tl.cumsum(has_rest, 0) - has_rest
    if tl.program_id(0) == 0:
        tl.store(counts_ptr, tl.sum(count, 0) + all_pieces)
        tl.store(counts_ptr + 1 + row, count, mask=row < batch)
    field = tl.arange(0, WIDTH)[None, :]
    # Every program works the cuts out and writes its share of them.
    for place in range(tl.program_id(0), tl.max(count, 0), tl.num_programs(0)):
        here = (row < batch) & (place < count)
        cut = (first_cut + place) * chunk * TILE
        from_key = tl.maximum(cut, low)
        to_key = tl.minimum(cut + chunk * TILE, length)
        record = tl.where(field == 0, row[:, None], 0)
        record = tl.where(field == 1, from_key[:, None], record)
        record = tl.where(field == 2, to_key[:, None], record)
        record = tl.where(field == 3, (first + place)[:, None], record)
        record = tl.where(field == 4, count[:, None], record)
        record = tl.where(field == 5, first[:, None], record)
        record = tl.where(field == 6, length[:, None], record)
        record = tl.where(field == 7, query[:, None], record)
        if WIDTH > HEADER:
            record = name_blocks(record, tables_ptr, row, from_key, to_key, here, block, table_stride, HEADER, WIDTH)
        target = tl.where(place < whole, first_whole + place, rest)
        tl.store(items_ptr + target[:, None] * WIDTH + field, record, mask=here[:, None] & (field < WIDTH))
    # Items of several tokens come last: those of one can ask for keys before this step's are written. A sequence's last item,
    # with the most keys, comes before its others.
    if CHUNK_TOKENS > 0:
        first_piece = tl.sum(count, 0) + tl.cumsum(pieces, 0) - pieces
        for place in range(tl.program_id(0), tl.max(pieces, 0), tl.num_programs(0)):
            here = (row < batch) & (place < pieces)
            token = (pieces - 1 - place) * CHUNK_TOKENS
            tokens = tl.minimum(rows - token, CHUNK_TOKENS)
            to_key = context - rows + token + tokens
            from_key = tl.where(window > 0, tl.maximum(to_key - tokens + 1 - window, 0), 0)
            record = tl.where(field == 0, row[:, None], 0)
            record = tl.where(field == 1, from_key[:, None], record)
            record = tl.where(field == 2, to_key[:, None], record)
            record = tl.where(field == 4, -tokens[:, None], record)
            record = tl.where(field == 6, (context - rows)[:, None], record)
            record = tl.where(field == 7, (query + token)[:, None], record)
            if WIDTH > HEADER:
                record = name_blocks(record, tables_ptr, row, from_key, to_key, here, block, table_stride, HEADER, WIDTH)
            target = first_piece + place
            tl.store(items_ptr + target[:, None] * WIDTH + field, record, mask=here[:, None] & (field < WIDTH))
    if USE_PDL:
        gdc_wait()  # whoever waits for this kernel waits for those before it


@triton.jit(do_not_specialize=["batch"])
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tables_ptr,
    items_ptr,
    counts_ptr,
    acc_ptr,  # [max_items, N, D] float32
    stats_ptr,  # [max_items, N, 2] float32: largest score, sum of weights
    done_ptr,  # [Q, G] int32, 0 before and after
    batch,
    scale_log2,
    q_stride,
    out_stride,
    table_stride,
    block_stride,  # of k and v alike
    token_stride,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,  # query heads of a key/value head
    M: tl.constexpr,  # the same, rounded up to the tensor cores' 16
    HEAD: tl.constexpr,
    D: tl.constexpr,  # HEAD, rounded up to a power of two
    BLOCK: tl.constexpr,  # tokens of a cache block
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
    WIDTH: tl.constexpr,  # of an item
):
    group = tl.program_id(0)
    worker = tl.program_id(1)
    workers = tl.num_programs(1)
    if USE_PDL:
        gdc_launch_dependents()
    heads: tl.constexpr = GROUPS * PER_GROUP
    lane = tl.arange(0, M)
    dim = tl.arange(0, D)
    head = group * PER_GROUP + lane
    is_head = lane < PER_GROUP
    is_dim = dim < HEAD
    if USE_PDL:
        gdc_wait()
    count = tl.load(counts_ptr)
    # Padding rows have no item; they are shared out among the workers too.
    for row in range(worker, batch, workers):
        if tl.load(counts_ptr + 1 + row) == 0:
            where = row * out_stride + head[:, None] * HEAD + dim[None, :]
            tl.store(out_ptr + where, tl.zeros([M, D], tl.float32), mask=is_head[:, None] & is_dim[None, :])
    for item in range(worker, count, workers):
        row = tl.load(items_ptr + item * WIDTH)
        begin = tl.load(items_ptr + item * WIDTH + 1)
        end = tl.load(items_ptr + item * WIDTH + 2)
        q_where = row * q_stride + head[:, None] * HEAD + dim[None, :]
        q = tl.load(q_ptr + q_where, mask=is_head[:, None] & is_dim[None, :], other=0.0)
        acc = tl.zeros([M, D], tl.float32)
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        # Tiles are aligned to the sequence's start, so that a row's tiles are the same whatever window or item begins where.
        for start in tl.range((begin // TILE) * TILE, end, TILE, num_stages=STAGES):
            key = start + tl.arange(0, TILE)
            is_seen = (key >= begin) & (key < end)
            base, offset = place_tile(tables_ptr + row * table_stride, start, end, block_stride, token_stride, BLOCK, TILE)
            k_here, v_here = k_ptr + base + group * HEAD, v_ptr + base + group * HEAD
            k = tl.load(k_here + offset[None, :] + dim[:, None], mask=is_seen[None, :] & is_dim[:, None], other=0.0)
            v = tl.load(v_here + offset[:, None] + dim[None, :], mask=is_seen[:, None] & is_dim[None, :], other=0.0)
            acc, top, total = attend_tile(q, k, v, is_seen[None, :], acc, top, total, scale_log2)
        shares = tl.load(items_ptr + item * WIDTH + 4)
        out_where = row * out_stride + head[:, None] * HEAD + dim[None, :]
        out_mask = is_head[:, None] & is_dim[None, :]
        if shares == 1:
            tl.store(out_ptr + out_where, finish(acc, total), mask=out_mask)
        else:
            flat = (tl.load(items_ptr + item * WIDTH + 3) * heads + head).to(tl.int64)
            tl.store(acc_ptr + flat[:, None] * HEAD + dim[None, :], acc, mask=out_mask)
            tl.store(stats_ptr + flat * 2, top, mask=is_head)
            tl.store(stats_ptr + flat * 2 + 1, total, mask=is_head)
            tl.debug_barrier()  # every thread's stores come before the one that counts
            arrived = tl.atomic_add(done_ptr + row * GROUPS + group, 1, sem="acq_rel")
            if arrived == shares - 1:
                tl.store(done_ptr + row * GROUPS + group, 0)
                first = tl.load(items_ptr + item * WIDTH + 5)
                acc = tl.zeros([M, D], tl.float32)
                top = tl.full([M], float("-inf"), tl.float32)
                total = tl.zeros([M], tl.float32)
                for share in range(shares):
                    flat = ((first + share) * heads + head).to(tl.int64)
                    part = tl.load(acc_ptr + flat[:, None] * HEAD + dim[None, :], mask=out_mask, other=0.0, cache_modifier=".cg")
                    part_top = tl.load(stats_ptr + flat * 2, mask=is_head, other=float("-inf"), cache_modifier=".cg")
                    part_total = tl.load(stats_ptr + flat * 2 + 1, mask=is_head, other=0.0, cache_modifier=".cg")
                    acc, top, total = join_chunks(acc, top, total, part, part_top, part_total)
                tl.store(out_ptr + out_where, finish(acc, total), mask=out_mask)
