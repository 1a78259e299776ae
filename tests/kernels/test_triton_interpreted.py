"""The Triton kernels on the CPU, in Triton's interpreter, against float64 and the CPU's sampler.

`TRITON_INTERPRET=1 pytest tests/kernels/test_triton_interpreted.py` where triton and numpy < 2.4 are (its interpreter turns
one-element arrays into integers, which numpy 2.4 refuses). Compiled on a GPU they are tested in `tests/kernels/cuda`.
"""

import os
from array import array

import numpy as np
import pytest
import torch

from node.engine.noise import uniform
from node.engine.sampler import DrawRow, draw
from node.kernels import reference
from node.kernels.attention.paged import AttentionShape
from node.request import Sampling

pytest.importorskip("triton", reason="triton comes with the CUDA builds of torch")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1 before Python starts", allow_module_level=True)
if tuple(int(part) for part in np.__version__.split(".")[:2]) >= (2, 4):
    pytest.skip("Triton's interpreter needs numpy < 2.4", allow_module_level=True)

from node.kernels.attention.items import DecodeWork, ItemCost
from node.kernels.attention.triton_backend import TritonAttention
from node.kernels.triton_sampling import draw_kernel, forbid_kernel, greedy_kernel, top_kernel

CPU = torch.device("cpu")


class Batch:
    """Sequences of (context, rows) over a cache whose unwritten places are NaN; float32."""

    def __init__(self, shapes, heads, groups, size, block, window=None):
        needed = [-(-context // block) for context, _ in shapes]
        order = torch.randperm(sum(needed) + 1).tolist()
        self.keys = torch.full((sum(needed) + 1, block, groups, size), float("nan"))
        self.values = self.keys.clone()
        self.tables = torch.zeros(len(shapes), max(needed) + 1, dtype=torch.int32)
        for s, (context, _) in enumerate(shapes):
            for index in range(needed[s]):
                self.tables[s, index] = place = order.pop()
                count = min(block, context - index * block)
                self.keys[place, :count], self.values[place, :count] = torch.randn(2, count, groups, size)
        self.lens = torch.tensor([context for context, _ in shapes], dtype=torch.int32)
        self.starts = torch.tensor([0, *(rows for _, rows in shapes)]).cumsum(0).to(torch.int32)
        self.q = torch.randn(int(self.starts[-1]), heads, size)
        self.longest = (max(rows for _, rows in shapes), max(context for context, _ in shapes))
        self.window = window
        self.shape = AttentionShape(
            heads, groups, size, block, torch.float32, size**-0.5, len(shapes), self.longest[1], (window,)
        )

    def expected(self):
        wide = (self.q.double().flatten(1), self.keys.double().transpose(1, 2), self.values.double().transpose(1, 2))
        found = reference.paged_attention(*wide, self.tables, self.starts, self.lens, self.shape.scale, self.window)
        return found.view(self.q.shape)

    def decode(self, attention):
        plan = attention.plan_decode(self.tables, self.lens, self.longest[1])
        out = torch.full_like(self.q, float("nan"))
        return attention.decode(self.q, self.keys, self.values, plan, out, window=self.window)

    def prefill(self, attention):
        plan = attention.plan_prefill(self.tables, self.starts, self.lens, *self.longest)
        out = torch.full_like(self.q, float("nan"))
        return attention.prefill(self.q, self.keys, self.values, plan, out, window=self.window)


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize(("geometry", "window"), [((8, 2, 64, 16), None), ((6, 2, 80, 32), 100), ((4, 4, 96, 128), None)])
def test_decode_matches_float64_and_leaves_its_counters_at_zero(geometry, window, is_deterministic):
    batch = Batch([(1, 1), (70, 1), (600, 1), (64, 1), (65, 1)], *geometry, window)
    attention = TritonAttention(batch.shape, CPU, is_deterministic=is_deterministic)
    torch.testing.assert_close(batch.decode(attention).double(), batch.expected(), atol=5e-6, rtol=0)
    assert not attention.work.done.any()


def planned(shapes, window, block, tokens):
    """The items of a short step with two padding sequences, and what they were made of."""
    count = len(shapes) + 2
    shape = AttentionShape(8, 2, 64, block, torch.float32, 0.1, count + 1, 8192, (window,))
    work = DecodeWork(shape, CPU, 49, item_blocks=24, chunk_rows=1024)
    tables = torch.randint(0, 9999, (count, max(-(-context // block) for context, _ in shapes) + 1), dtype=torch.int32)
    rows = [rows for _, rows in shapes]
    starts = torch.tensor([0, *rows, 0, 0]).cumsum(0).to(torch.int32)
    lens = torch.tensor([context for context, _ in shapes] + [0, 0], dtype=torch.int32)
    found = work.plan_chunks(tables, starts, lens, 49, ItemCost(), tokens)[window]
    return found.items[: int(found.counts[0])].tolist(), found.counts.tolist(), tables, starts.tolist()


@pytest.mark.parametrize("window", [None, 100, 7])
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("tokens", [4, 16, 21])
def test_items_of_a_short_step_cover_every_row_and_every_key_that_it_sees_once(window, block, tokens):
    shapes = [(260, 1), (225, 225), (3000, 1), (1500, 17), (1, 1), (2, 2), (70, 16), (200, 15), (2048, 33)]
    items, counts, tables, starts = planned(shapes, window, block, tokens)
    seen = {}
    for sequence, begin, end, place, shares, first, known, row, *blocks in items:
        context, rows = shapes[sequence]
        numbers = range(begin // block, begin // block + 24)
        assert blocks == [int(tables[sequence, number]) if number * block < end else 0 for number in numbers]
        if shares < 0:
            at, count = row - starts[sequence], -shares
            assert rows > 1
            assert count <= tokens
            assert (end, known) == (context - rows + at + count, context - rows)
            assert begin == (max(0, end - count + 1 - window) if window else 0)
            for number in range(row, row + count):
                seen.setdefault(number, []).append(sequence)
        else:
            assert (rows, row, known, shares) == (1, starts[sequence], context, counts[1 + sequence])
            seen.setdefault(row, []).append((begin, end, place, first))
    for sequence, (context, rows) in enumerate(shapes):
        for row in range(starts[sequence], starts[sequence] + rows):
            parts = sorted(seen.pop(row))
            if rows > 1:
                assert parts == [sequence]
                continue
            assert parts[0][0] == (max(0, context - window) if window else 0)
            assert [end for _, end, _, _ in parts] == [begin for begin, _, _, _ in parts[1:]] + [context]
            assert [place - first for _, _, place, first in parts] == list(range(len(parts)))
    assert not seen
    assert counts[-2:] == [0, 0]


def test_decode_padding_rows_are_zero():
    batch = Batch([(70, 1), (300, 1), (64, 1)], 4, 2, 16, 16)
    attention = TritonAttention(batch.shape, CPU)
    expected = batch.expected()
    batch.lens[1] = 0
    actual = batch.decode(attention)
    assert (actual[1] == 0).all()
    torch.testing.assert_close(actual[::2].double(), expected[::2], atol=5e-6, rtol=0)


@pytest.mark.parametrize("window", [None, 33])
def test_prefill_of_mixed_chunks_matches_float64(window):
    batch = Batch([(129, 129), (70, 1), (200, 37)], 9, 3, 16, 16, window)
    torch.testing.assert_close(batch.prefill(TritonAttention(batch.shape, CPU)).double(), batch.expected(), atol=5e-6, rtol=0)


@pytest.mark.parametrize("window", [None, 300])
def test_deterministic_rows_have_the_same_bits_alone_in_a_batch_and_in_prefill(window):
    batch = Batch([(1, 1), (900, 1), (65, 1), (300, 1)], 4, 2, 16, 16, window)
    attention = TritonAttention(batch.shape, CPU, is_deterministic=True)
    together = batch.decode(attention)
    for s in range(4):
        plan = attention.plan_decode(batch.tables[s : s + 1], batch.lens[s : s + 1], 900)
        out = torch.empty_like(batch.q[:1])
        alone = attention.decode(batch.q[s : s + 1], batch.keys, batch.values, plan, out, window=window)
        assert torch.equal(alone[0], together[s])
    assert torch.equal(batch.prefill(attention), together)


def places(rows):
    """Tokens, and answers of three turns, the second of which is written."""
    full = torch.full((4, rows), -7, dtype=torch.int32)
    return full[0], full[1:], torch.tensor([1], dtype=torch.int32)


def launch_greedy(logits, parts=4):
    rows, vocab = logits.shape
    tokens, answers, turn = places(rows)
    arrived = torch.zeros(rows, dtype=torch.int32)
    memory = torch.empty(rows, parts), torch.empty(rows, parts, dtype=torch.int32)
    greedy_kernel[(rows, parts)](
        logits, tokens, answers, turn, None, *memory, arrived, vocab, vocab, rows, PARTS=parts, BLOCK=256, IS_AGAIN=False,
        USE_PDL=False,
    )  # fmt: skip
    assert not arrived.any()
    return tokens.tolist(), answers.tolist()


def test_greedy_takes_the_lowest_of_the_largest_and_marks_rows_that_are_not_finite():
    logits = torch.randn(6, 3000)
    logits[1, [100, 2000]] = 50.0
    logits[2, 17], logits[3, 2999], logits[4] = float("nan"), float("inf"), float("-inf")
    tokens, answers = launch_greedy(logits)
    first, last = int(logits[0].argmax()), int(logits[5].argmax())
    assert answers == [[-7] * 6, [first, 100, -1, -1, -1, last], [-7] * 6]
    assert tokens == [first, 100, 0, 0, 0, last]


def test_greedy_again_replaces_the_tokens_of_its_rows_and_no_answer_that_is_not_sound():
    logits = torch.randn(6, 3000)
    tokens, answers, _ = places(6)
    answers[1] = torch.tensor([1, 2, -1, 4, -1, 6])
    where, arrived = torch.tensor([4, 0, 5]), torch.zeros(6, dtype=torch.int32)
    memory = torch.empty(6, 4), torch.empty(6, 4, dtype=torch.int32)
    greedy_kernel[(3, 4)](
        logits, tokens, answers[1], None, where, *memory, arrived, 3000, 3000, 6, PARTS=4, BLOCK=256, IS_AGAIN=True, USE_PDL=False
    )  # fmt: skip
    best = logits.argmax(dim=1).tolist()
    assert tokens.tolist() == [best[0], -7, -7, -7, best[4], best[5]]
    assert answers[1].tolist() == [best[0], 2, -1, 4, -1, best[5]]


def test_tops_give_the_token_that_greedy_takes_from_the_logits():
    logits = torch.randn(6, 3000)
    logits[1, [100, 2000]] = 50.0
    logits[2, 17], logits[3, 2999], logits[4] = float("nan"), float("inf"), float("-inf")
    best = [part.max(dim=1) for part in logits.split(999, dim=1)]
    values, columns = torch.stack([part.values for part in best], 1), torch.stack([part.indices for part in best], 1)
    parts = torch.stack([values.view(torch.int32), (columns + 999 * torch.arange(4)).int()], dim=2)
    tokens, answers, turn = places(6)
    top_kernel[(6,)](parts, tokens, answers, turn, 4, 6, PARTS=8, USE_PDL=False)
    assert (tokens.tolist(), answers.tolist()) == launch_greedy(logits)


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "typical_p": 0.5},
        {"temperature": 2.0, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 50, "typical_p": 0.9, "top_p": 0.85, "min_p": 0.02},
        {"temperature": 1.0, "top_p": 5e-324},
        {"temperature": 1.0, "typical_p": 5e-324},
        {"temperature": 1e-30},
    ],
    ids=str,
)
@pytest.mark.parametrize("in_place", [False, True])
def test_draw_gives_the_tokens_of_the_cpu(parameters, in_place):
    logits = torch.randn(3, 2000) * 2
    rows = [DrawRow(Sampling(max_new_tokens=9, seed=seed, **parameters), 0, array("q", [1, 2]), 1) for seed in range(3)]
    s = rows[0].sampling
    asked = [[s.temperature, s.top_k, s.typical_p, s.top_p, s.min_p, uniform(seed, 0, 2)] for seed in range(3)]
    tokens, where = torch.zeros(5, dtype=torch.int32), torch.tensor([4, 0, 2])
    answers = torch.tensor([7, 7, -1, 7, 7], dtype=torch.int32)
    held = torch.full((5, 2000), float("nan"))
    held[where] = logits
    draw_kernel[(3,)](
        held if in_place else logits, torch.tensor(asked, dtype=torch.float64), where, tokens, answers, 2000, 2000,
        IN_PLACE=in_place, ANY_KEY=0x7FFFFFFF, TINY=torch.finfo(torch.float32).tiny, SPANS=4, BLOCK=512,
    )  # fmt: skip
    expected = [token.token_id for token in draw(logits, rows)]
    assert tokens[where].tolist() == expected
    assert answers.tolist() == [expected[1], 7, -1, 7, expected[0]]


@pytest.mark.parametrize("vocab", [2000, 2048, 2049])
def test_forbid_writes_what_the_words_do_not_allow_and_nothing_else(vocab):
    words = torch.randint(-(1 << 31), 1 << 31, (4, -(-vocab // 32))).to(torch.int32)
    pairs = torch.tensor([[3, 0], [1, 4]])
    logits = torch.randn(6, vocab)
    expected = logits.clone()
    for place, row in pairs.T.tolist():
        allowed = np.unpackbits(words[place].numpy().view(np.uint8), bitorder="little")[:vocab]
        expected[row, torch.from_numpy(allowed) == 0] = float("-inf")
    forbid_kernel[(2, -(-vocab // 512))](logits, words, pairs, vocab, vocab, words.shape[1], BLOCK=512)
    assert torch.equal(logits, expected)
