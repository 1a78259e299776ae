"""Sampling on a GPU against the CPU's sampler: same tokens for the same seeds."""

import itertools
from array import array
from dataclasses import replace

import msgspec
import pytest
import torch

from node.engine.device_sampler import Choice, DeviceSampler
from node.engine.noise import uniform
from node.engine.sampler import DrawRow, RowMask, draw
from node.request import Sampling

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

VOCAB = 128_256
EDGE = 1e-5  # of the noise: what float32 makes of the sums of 150,000 weights, and of a border among them

PARAMETERS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8, "logprobs": 3},
    {"temperature": 1.0, "typical_p": 0.5},
    {"temperature": 2.0, "min_p": 0.05},
    {"repetition_penalty": 1.7},
    {"temperature": 1.0, "frequency_penalty": 0.9, "presence_penalty": 0.4},
    {"logit_bias": ((5, 60.0), (9, -3.0))},
    {"temperature": 1.5, "top_k": 50, "typical_p": 0.9, "top_p": 0.85, "min_p": 0.02, "repetition_penalty": 0.6},
    {"temperature": 1e-30},
    {"temperature": 1.0, "top_p": 5e-324},
    {"temperature": 1.0, "typical_p": 5e-324},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 5.0, "top_k": 2**31 - 1, "top_p": 0.9999},
    {"frequency_penalty": -2.0, "logprobs": 5},
]


def make_rows(seed, count=16):
    return [
        DrawRow(Sampling(max_new_tokens=9, seed=seed * 1000 + i, **PARAMETERS[i % len(PARAMETERS)]), 0, array("q", range(40)), 8)
        for i in range(count)
    ]


def on_gpu(logits, rows, mask=None, *, spoil=False):
    sampler = DeviceSampler(logits.shape[1], len(rows), torch.device("cuda"))
    choice = sampler.new_choice(len(rows))
    x = logits.cuda()
    if spoil:
        choice.tokens.fill_(-99)
        choice.answers.fill_(-7)
    sampler.greedy(x, choice)
    return sampler.draw(x, rows, choice.step(0), mask).read(), choice


def near(row, change):
    """The same row with other borders of what its filters keep."""
    borders = ("top_p", "typical_p", "min_p")
    moved = {name: min(max(getattr(row.sampling, name) + change, 0.0), 1.0) for name in borders}
    kept = {name: value for name, value in moved.items() if 0.0 < getattr(row.sampling, name) < 1.0}
    return replace(row, sampling=msgspec.structs.replace(row.sampling, **kept))


def draw_nearby(logits, rows, monkeypatch):
    """The first and the last token of every row that the CPU draws with noise and borders as far off as float32 may be."""
    found = []
    for border, noise in itertools.product(
        (-EDGE, 0.0, EDGE), (-EDGE, EDGE)
    ):  # a larger noise gives the same tokens or later ones
        with monkeypatch.context() as patch:
            patch.setattr("node.engine.sampler.uniform", lambda *key, by=noise: min(max(uniform(*key) + by, 0.0), 1.0))
            found.append([token.token_id for token in draw(logits, [near(row, border) for row in rows])])
    return [(min(tokens), max(tokens)) for tokens in zip(*found, strict=True)]


@pytest.mark.parametrize("vocab", [49_152, VOCAB, 151_936, 1000])
@pytest.mark.parametrize("count", [1, 16, 64])
def test_draw_on_the_gpu_gives_the_tokens_of_the_cpu(vocab, count, monkeypatch):
    rows = make_rows(count, count)
    logits = torch.randn(count, vocab) * 3
    ours, _ = on_gpu(logits, rows, spoil=True)
    theirs = draw(logits, rows)
    # Sums run in another order, so a draw within rounding of the next token may be that one, and a token at a filter's border
    # may be kept by one side alone. Where two are as far from the entropy, up to rounding, the typical filter may keep the
    # other one, which may be a hundredth of what is left: few rows, but no bound on where their draw goes.
    nearby = draw_nearby(logits, rows, monkeypatch)
    is_near = [first <= our.token_id <= last for our, (first, last) in zip(ours, nearby, strict=True)]
    assert all(found or row.sampling.typical_p < 1.0 for found, row in zip(is_near, rows, strict=True)), is_near
    assert is_near.count(False) <= 1, is_near
    assert sum(our.token_id != their.token_id for our, their in zip(ours, theirs, strict=True)) <= max(1, count // 16)
    for our, their in zip(ours, theirs, strict=True):
        if our.token_id == their.token_id and their.logprob is not None:
            assert our.logprob == pytest.approx(their.logprob, abs=1e-4)
            assert [t.token_id for t in our.top] == [t.token_id for t in their.top]


def test_greedy_ties_take_the_lowest_index():
    logits = torch.zeros(4, VOCAB)
    for row, (low, high) in enumerate(((5, 9), (2047, 2048), (100, 128_000), (128_254, 128_255))):
        logits[row, [low, high]] = 2.5
    ours, _ = on_gpu(logits, [DrawRow(Sampling(max_new_tokens=1), 0, array("q", [1]), 1)] * 4)
    assert [token.token_id for token in ours] == [5, 2047, 100, 128_254]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 2048, VOCAB - 1])
def test_non_finite_rows_are_none_and_spare_the_others(poison, column):
    rows, logits = make_rows(1), torch.randn(len(PARAMETERS), VOCAB)
    clean, _ = on_gpu(logits, rows)
    logits[3, column] = logits[0, column] = logits[6, column] = poison
    ours, choice = on_gpu(logits, rows)
    assert [index for index, token in enumerate(ours) if token is None] == [0, 3, 6]
    assert all(ours[i] == clean[i] for i in range(len(rows)) if i not in (0, 3, 6))
    assert ((choice.tokens >= 0) & (choice.tokens < VOCAB)).all()


def test_masks_hold():
    rows, logits = make_rows(2), torch.randn(len(PARAMETERS), VOCAB) * 3
    words = torch.randint(-(1 << 31), 1 << 31, (len(rows), VOCAB // 32)).to(torch.int32)
    mask = RowMask([0, 1, 4, 7, 9], words)
    ours, theirs = on_gpu(logits, rows, mask)[0], draw(logits, rows, mask)
    assert sum(a.token_id != b.token_id for a, b in zip(ours, theirs, strict=True)) <= 1
    for place in mask.rows:
        token = ours[place].token_id
        assert int(words[place, token // 32]) >> (token % 32) & 1


def test_masks_of_greedy_rows_hold():
    words = torch.randint(-(1 << 31), 1 << 31, (64, VOCAB // 32)).to(torch.int32)
    rows = [DrawRow(Sampling(max_new_tokens=1), 0, array("q", [1]), 1)] * 64
    logits = torch.randn(64, VOCAB)
    for masked in (list(range(64)), list(range(0, 64, 3))):
        mask = RowMask(masked, words.pin_memory())
        assert on_gpu(logits.clone(), rows, mask)[0] == draw(logits, rows, mask)


def test_greedy_in_a_graph_follows_new_logits():
    logits = torch.randn(64, VOCAB, device="cuda")
    sampler = DeviceSampler(VOCAB, 64, torch.device("cuda"))
    choice = sampler.new_choice(64)
    sampler.greedy(logits, choice)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.greedy(logits, choice)
    for _ in range(5):
        logits.normal_()
        choice.tokens.fill_(-1)
        choice.answers.fill_(-1)
        graph.replay()
        assert torch.equal(choice.tokens.long(), logits.argmax(dim=1))
        assert torch.equal(choice.answers[0], choice.tokens)


def test_answers_go_where_the_turn_says_and_leave_in_time():
    logits, turn = torch.empty(8, VOCAB, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    choice = Choice.of(torch.zeros(8, dtype=torch.int32, device="cuda"), turn, turns=2)
    sampler = DeviceSampler(VOCAB, 8, torch.device("cuda"))
    rows = [DrawRow(Sampling(max_new_tokens=1), 0, array("q", [1]), 1)] * 8
    sampler.greedy(logits.normal_(), choice)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        sampler.greedy(logits, choice)
    drawn, expected = [], []
    for step in range(12):
        choice.claim(step % 2)
        turn.fill_(step % 2)
        expected.append(logits.normal_().argmax(dim=1).tolist())
        graph.replay()
        drawn.append(sampler.draw(logits, rows, choice.step(step % 2)))
    assert [[token.token_id for token in step.read()] for step in drawn] == expected
