"""Sampling on a GPU in Triton: the greedy choice of every row, and the filtered random choice of the rows that ask for it.

Filters need no sort. A filter keeps the tokens whose key is at most T, where T is the smallest key at which the kept weight
reaches what was asked; keys are the bit patterns of non-negative floats, which order like the floats, so T is found three bits at
a time in eleven passes over the row (512 KiB for 128,256 tokens, in the L2 cache). Definitions: `node.engine.filters`.

Shape letters: W rows, V vocabulary, n rows that draw at random.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["turn_stride"])  # one compilation for every number of rows
def greedy_kernel(
    logits_ptr,  # [W, V] float32
    token_ptr,  # [W] int32, written: 0 where the largest logit is not finite or a logit is NaN
    answer_ptr,  # [turns, W] int32, written: the same, and -1 there
    turn_ptr,  # [1] int32
    row_ptr,  # [programs] int64: IS_AGAIN: rows whose answers, [W], stay -1 where they are; not read otherwise
    part_value_ptr,  # [W, PARTS] float32
    part_token_ptr,  # [W, PARTS] int32
    arrived_ptr,  # [W] int32, 0 before and after
    vocab,
    row_stride,
    turn_stride,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_AGAIN: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """A program owns one part of a row; the one that comes last joins the parts. Lowest index wins among equals."""
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    if IS_AGAIN:
        row = tl.load(row_ptr + row).to(tl.int32)
    part = tl.program_id(1)
    span = tl.cdiv(tl.cdiv(vocab, PARTS), BLOCK) * BLOCK
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    token = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    is_nan = tl.zeros([BLOCK], tl.int32)
    for start in range(part * span, tl.minimum(part * span + span, vocab), BLOCK):
        column = start + lane
        x = tl.load(logits_ptr + row.to(tl.int64) * row_stride + column, mask=column < vocab, other=float("-inf"))
        is_nan = is_nan | (x != x).to(tl.int32)
        is_higher = x > best
        best = tl.where(is_higher, x, best)
        token = tl.where(is_higher, column, token)
    top = tl.max(best, 0)
    first = tl.min(tl.where(best == top, token, 0x7FFFFFFF), 0)
    value = tl.where(tl.max(is_nan, 0) > 0, float("nan"), top)
    tl.store(part_value_ptr + row * PARTS + part, value)
    tl.store(part_token_ptr + row * PARTS + part, first)
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == PARTS - 1:
        tl.store(arrived_ptr + row, 0)
        each = tl.arange(0, PARTS)
        values = tl.load(part_value_ptr + row * PARTS + each, cache_modifier=".cg")
        tokens = tl.load(part_token_ptr + row * PARTS + each, cache_modifier=".cg")
        if not IS_AGAIN:
            answer_ptr += tl.load(turn_ptr) * turn_stride
        _choose(values, tokens, token_ptr + row, answer_ptr + row, IS_AGAIN)


@triton.jit(do_not_specialize=["turn_stride"])
def top_kernel(
    part_ptr,  # [W, P, 2] int32: the largest logit of each part (float32 bits, NaN where one is) and its token
    token_ptr,  # these three: see `greedy_kernel`
    answer_ptr,
    turn_ptr,
    count,  # P
    turn_stride,
    PARTS: tl.constexpr,  # a power of two, at least P
    USE_PDL: tl.constexpr,
):
    """`greedy_kernel` where the output projection has found the largest of every part. A program owns a row."""
    row = tl.program_id(0)
    answer_ptr += tl.load(turn_ptr) * turn_stride
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    each = tl.arange(0, PARTS)
    part_ptr += (row * count + each) * 2
    bits = tl.load(part_ptr, mask=each < count, other=-8388608)  # -inf
    tokens = tl.load(part_ptr + 1, mask=each < count, other=0x7FFFFFFF)
    values = bits.to(tl.float32, bitcast=True)
    _choose(values, tokens, token_ptr + row, answer_ptr + row, False)


@triton.jit
def _choose(values, tokens, token_ptr, answer_ptr, IS_AGAIN: tl.constexpr):
    """The lowest token of the largest value; 0, and the answer -1, where that is not finite or a value is NaN."""
    has_nan = tl.max((values != values).to(tl.int32), 0) > 0
    top = tl.max(tl.where(values != values, float("-inf"), values), 0)
    chosen = tl.min(tl.where(values == top, tokens, 0x7FFFFFFF), 0)
    is_sound = (top > float("-inf")) & (top < float("inf")) & (has_nan == 0)
    chosen = tl.where(is_sound, chosen, 0)
    tl.store(token_ptr, chosen)
    if IS_AGAIN:
        tl.store(answer_ptr, chosen, mask=tl.load(answer_ptr) >= 0)
    else:
        tl.store(answer_ptr, tl.where(is_sound, chosen, -1))


@triton.jit
def _distances(x_ptr, start, vocab, best, temperature, BLOCK: tl.constexpr):
    """How far a block of logits lies below the largest one, in units of the temperature: [BLOCK] float32, 0 or more."""
    column = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + column, mask=column < vocab, other=float("-inf"))
    return (best - x) / temperature


@triton.jit
def _keys(far, kind: tl.constexpr, log_total, entropy):
    """What a filter orders by: the distance from the top, or (typical) how far the surprise is from the entropy."""
    if kind == 2:
        return tl.abs(far + log_total - entropy).to(tl.int32, bitcast=True)
    return far.to(tl.int32, bitcast=True)


@triton.jit
def _border(
    x_ptr, vocab, best, temperature, target, top_key, typical_key, log_total, entropy, kind: tl.constexpr, BLOCK: tl.constexpr
):
    """The smallest key at which the kept weight reaches `target`. kind 0: weight 1 a token; 1 and 2: its probability."""
    low = tl.zeros([], tl.int32)
    for step in range(11):
        shift = 30 - 3 * step
        a1 = tl.zeros([BLOCK], tl.float32)
        a2 = tl.zeros([BLOCK], tl.float32)
        a3 = tl.zeros([BLOCK], tl.float32)
        a4 = tl.zeros([BLOCK], tl.float32)
        a5 = tl.zeros([BLOCK], tl.float32)
        a6 = tl.zeros([BLOCK], tl.float32)
        a7 = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, vocab, BLOCK, num_stages=4):
            far = _distances(x_ptr, start, vocab, best, temperature, BLOCK)
            key = _keys(far, kind, log_total, entropy)
            is_kept = (far.to(tl.int32, bitcast=True) <= top_key) & (start + tl.arange(0, BLOCK) < vocab)
            if kind == 1:
                is_kept = is_kept & (_keys(far, 2, log_total, entropy) <= typical_key)
            if kind == 0:  # noqa: SIM108 - a branch of the compiler, not of the kernel
                weight = tl.where(is_kept, 1.0, 0.0)
            else:
                weight = tl.where(is_kept, tl.exp(-far - log_total), 0.0)
            # A key beyond int32 has no bit there to try: the first step looks at bit 30 alone.
            slot = (key - low) >> shift
            slot = tl.where(key < low, 0, slot)
            a1 += tl.where(slot < 1, weight, 0.0)
            a2 += tl.where(slot < 2, weight, 0.0)
            a3 += tl.where(slot < 3, weight, 0.0)
            a4 += tl.where(slot < 4, weight, 0.0)
            a5 += tl.where(slot < 5, weight, 0.0)
            a6 += tl.where(slot < 6, weight, 0.0)
            a7 += tl.where(slot < 7, weight, 0.0)
        jump = (tl.sum(a1, 0) < target).to(tl.int32)
        if step > 0:
            jump += (tl.sum(a2, 0) < target).to(tl.int32)
            jump += (tl.sum(a3, 0) < target).to(tl.int32)
            jump += (tl.sum(a4, 0) < target).to(tl.int32)
            jump += (tl.sum(a5, 0) < target).to(tl.int32)
            jump += (tl.sum(a6, 0) < target).to(tl.int32)
            jump += (tl.sum(a7, 0) < target).to(tl.int32)
        low += jump << shift
    return low


@triton.jit
def forbid_kernel(
    x_ptr,  # float32 logits, -inf is written where a token is forbidden and nothing elsewhere
    words_ptr,  # [W, width] int32: bit i of word w allows token 32 w + i
    pair_ptr,  # [2, n] int64: rows of the words, and their rows of x
    vocab,
    row_stride,
    width,
    BLOCK: tl.constexpr,
):
    """A program owns a block of a row. Bytes: the words, and 32 a forbidden token's sector; x is not read."""
    place = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = column < vocab
    words_ptr += tl.load(pair_ptr + place) * width
    word = tl.load(words_ptr + column // 32, mask=is_inside, other=-1)
    is_forbidden = ((word >> (column % 32)) & 1) == 0
    x_ptr += tl.load(pair_ptr + tl.num_programs(0) + place) * row_stride
    tl.store(x_ptr + column, tl.full([BLOCK], float("-inf"), tl.float32), mask=is_inside & is_forbidden)


@triton.jit
def draw_kernel(
    x_ptr,  # [n, V] float32: logits after penalties, bias and masks; IN_PLACE: the step's own [W, V], read at the rows
    asked_ptr,  # [n, 6] float64: temperature, top_k, typical_p, top_p, min_p, noise
    row_ptr,  # [n] int64: which row of the next two
    token_ptr,  # [W] int32, written at the rows
    answer_ptr,  # [W] int32, the same but where it is -1
    vocab,
    row_stride,
    IN_PLACE: tl.constexpr,
    ANY_KEY: tl.constexpr,
    TINY: tl.constexpr,  # the smallest normal float32
    SPANS: tl.constexpr,  # a power of two; SPANS x BLOCK is at least V
    BLOCK: tl.constexpr,
):
    """A program owns a row. Temperature 0 is the limit of small ones; with noise 0 the lowest index wins among equals."""
    place = tl.program_id(0)
    row = tl.load(row_ptr + place)
    x_ptr += (row if IN_PLACE else place.to(tl.int64)) * row_stride
    asked_ptr += place * 6
    temperature = tl.maximum(tl.load(asked_ptr).to(tl.float32), TINY)
    top_k = tl.load(asked_ptr + 1).to(tl.float32)
    typical_p = tl.load(asked_ptr + 2).to(tl.float32)
    top_p = tl.load(asked_ptr + 3).to(tl.float32)
    min_p = tl.load(asked_ptr + 4).to(tl.float32)
    noise = tl.load(asked_ptr + 5)
    lane = tl.arange(0, BLOCK)

    best_each = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in tl.range(0, vocab, BLOCK, num_stages=4):
        column = start + lane
        best_each = tl.maximum(best_each, tl.load(x_ptr + column, mask=column < vocab, other=float("-inf")))
    best = tl.max(best_each, 0)

    top_key = tl.full([], ANY_KEY, tl.int32)
    typical_key = tl.full([], ANY_KEY, tl.int32)
    if (top_k > 0) & (top_k < vocab):
        top_key = _border(x_ptr, vocab, best, temperature, top_k, top_key, typical_key, 0.0, 0.0, 0, BLOCK)
    log_total = 0.0
    entropy = 0.0
    if typical_p != 1.0:
        log_total, entropy = _mass(x_ptr, vocab, best, temperature, top_key, typical_key, 0.0, 0.0, BLOCK)
        target = tl.maximum(typical_p, TINY)  # a mass of 0 keeps one token, not none
        typical_key = _border(x_ptr, vocab, best, temperature, target, top_key, typical_key, log_total, entropy, 2, BLOCK)
    if top_p != 1.0:
        # Relative to what the filters before left; the typical filter's own numbers still say what that is.
        kept, _ = _mass(x_ptr, vocab, best, temperature, top_key, typical_key, log_total, entropy, BLOCK)
        target = tl.maximum(top_p * tl.exp(kept - log_total), TINY)
        nucleus = _border(x_ptr, vocab, best, temperature, target, top_key, typical_key, log_total, entropy, 1, BLOCK)
        top_key = tl.minimum(top_key, nucleus)
    if min_p > 0:
        top_key = tl.minimum(top_key, (-tl.log(min_p)).to(tl.int32, bitcast=True))

    chosen = _invert(x_ptr, vocab, best, temperature, top_key, typical_key, log_total, entropy, noise, SPANS, BLOCK)
    tl.store(token_ptr + row, chosen)
    tl.store(answer_ptr + row, chosen, mask=tl.load(answer_ptr + row) >= 0)


@triton.jit
def _mass(x_ptr, vocab, best, temperature, top_key, typical_key, log_total, entropy, BLOCK: tl.constexpr):
    """Logarithm of the kept weight exp(-distance), and the entropy of its distribution."""
    total = tl.zeros([BLOCK], tl.float32)
    surprise = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, vocab, BLOCK, num_stages=4):
        far = _distances(x_ptr, start, vocab, best, temperature, BLOCK)
        is_kept = (far.to(tl.int32, bitcast=True) <= top_key) & (_keys(far, 2, log_total, entropy) <= typical_key)
        weight = tl.where(is_kept, tl.exp(-far), 0.0)
        total += weight
        surprise += tl.where(weight > 0, weight * far, 0.0)
    mass = tl.sum(total, 0)
    return tl.log(mass), tl.log(mass) + tl.sum(surprise, 0) / mass


@triton.jit
def _weights(x_ptr, start, vocab, best, temperature, top_key, typical_key, log_total, entropy, BLOCK: tl.constexpr):
    """exp(-distance) of the kept tokens of a block, 0 of the others: [BLOCK] float64."""
    far = _distances(x_ptr, start, vocab, best, temperature, BLOCK)
    is_kept = (far.to(tl.int32, bitcast=True) <= top_key) & (_keys(far, 2, log_total, entropy) <= typical_key)
    return tl.where(is_kept, tl.exp(-far), 0.0).to(tl.float64)


@triton.jit
def _invert(
    x_ptr, vocab, best, temperature, top_key, typical_key, log_total, entropy, noise, SPANS: tl.constexpr, BLOCK: tl.constexpr
):
    """The first token at which the running sum of the kept weights exceeds noise x total; the last kept one where none does.

    Sums of blocks first, then one block token by token, all in float64.
    """
    span = tl.arange(0, SPANS)
    sums = tl.zeros([SPANS], tl.float64)
    for start in tl.range(0, vocab, BLOCK, num_stages=4):
        weight = _weights(x_ptr, start, vocab, best, temperature, top_key, typical_key, log_total, entropy, BLOCK)
        sums = tl.where(span == start // BLOCK, tl.sum(weight, 0), sums)
    ends = tl.cumsum(sums, 0)
    target = noise * tl.max(ends, 0)
    last_kept = tl.max(tl.where(sums > 0, span, 0), 0)
    here = tl.minimum(tl.sum((ends <= target).to(tl.int32), 0), last_kept)
    before = tl.sum(tl.where(span < here, sums, 0.0), 0)
    weight = _weights(x_ptr, here * BLOCK, vocab, best, temperature, top_key, typical_key, log_total, entropy, BLOCK)
    index = tl.sum((before + tl.cumsum(weight, 0) <= target).to(tl.int32), 0)
    last = tl.max(tl.where(weight > 0, tl.arange(0, BLOCK), 0), 0)
    return here * BLOCK + tl.minimum(index, last)
