"""Every filter against transformers' logits processors, the draws against their distribution, rows against each other."""

from array import array

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from node.engine import filters
from node.engine.noise import uniform, uniforms
from node.engine.sampler import DrawRow, RowMask, draw, score_prompt
from node.request import DrawnToken, Sampling

VOCAB = 3000


def random_logits(rows=4, vocab=VOCAB, spread=2.0, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def column(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)[:, None]


def row(tokens=(1, 2, 3), prompt_count=2, choice_index=0, **sampling):
    return DrawRow(Sampling(**{"max_new_tokens": 9, **sampling}), choice_index, array("q", tokens), prompt_count)


def same_kept(ours, theirs):
    return torch.equal(ours.isneginf(), theirs.isneginf())


@pytest.mark.parametrize("k", [1, 5, 2999, 5000])
def test_top_k_keeps_what_transformers_keeps(k):
    x = random_logits()
    assert same_kept(filters.keep_top_k(x, column(*[k] * 4, dtype=torch.int64)), TopKLogitsWarper(k)(None, x))


@pytest.mark.parametrize(("p", "spread"), [(0.1, 2.0), (0.9, 2.0), (0.999, 0.1), (0.5, 8.0)])
def test_top_p_keeps_what_transformers_keeps(p, spread):
    x = random_logits(spread=spread)
    assert same_kept(filters.keep_top_p(x, column(*[p] * 4)), TopPLogitsWarper(p)(None, x))


def test_top_p_wider_than_the_candidates_sorts_everything():
    x = random_logits(spread=0.01)
    kept = (~filters.keep_top_p(x, column(0.9, 0.9, 0.9, 0.9)).isneginf()).sum(dim=1)
    assert (kept > filters.NUCLEUS_CANDIDATES).all()


@pytest.mark.parametrize("share", [0.01, 0.2, 1.0])
def test_min_p_keeps_what_transformers_keeps(share):
    x = random_logits()
    assert same_kept(filters.keep_min_p(x, column(*[share] * 4)), MinPLogitsWarper(share)(None, x))


@pytest.mark.parametrize("mass", [0.2, 0.9])
def test_typical_keeps_what_transformers_keeps(mass):
    x = random_logits()
    assert same_kept(filters.keep_typical(x, column(*[mass] * 4)), TypicalLogitsWarper(mass)(None, x))


def test_repetition_penalty_equals_transformers():
    x, ids = random_logits(1), torch.tensor([[5, 9, 5, 700]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, x.clone())
    filters.penalise_repetition(x[0], ids[0], 1.7)
    assert torch.equal(x, expected)


def test_frequency_and_presence_count_the_output_only():
    x = torch.zeros(1, 10)
    x[0, 4] = 1.0
    rows = [row(tokens=(4, 4, 4, 3, 3, 7), prompt_count=3, frequency_penalty=0.5, presence_penalty=0.25)]
    plain = x[0].clone()
    filters.penalise_output(plain, torch.tensor([3, 3, 7]), 0.5, 0.25)
    assert plain.tolist() == [0, 0, 0, -1.25, 1.0, 0, 0, -0.75, 0, 0]
    assert draw(x, rows)[0].token_id == 4  # the prompt's own 4s are not penalised


def test_logit_bias_moves_the_greedy_choice():
    x = random_logits(1)
    assert draw(x, [row(logit_bias=((17, 100.0),))])[0].token_id == 17


def test_greedy_is_the_argmax():
    x = random_logits()
    assert [token.token_id for token in draw(x, [row()] * 4)] == x.argmax(dim=1).tolist()


def test_draw_leaves_the_logits_unmodified():
    x = random_logits()
    before = x.clone()
    draw(x, [row(), row(temperature=0.7, top_k=5), row(logit_bias=((1, 5.0),)), row(repetition_penalty=2.0)])
    assert torch.equal(x, before)


def test_logprobs_are_of_the_unmodified_distribution():
    x = random_logits(1)
    token = draw(x, [row(temperature=0.3, top_k=2, logit_bias=((8, 50.0),), logprobs=3)])[0]
    log_p = x[0].log_softmax(-1)
    assert token.logprob == log_p[token.token_id].item()
    assert [item.token_id for item in token.top] == log_p.topk(3).indices.tolist()
    assert [item.logprob for item in token.top] == log_p.topk(3).values.tolist()


def test_logprobs_zero_gives_the_drawn_token_alone():
    token = draw(random_logits(1), [row(logprobs=0)])[0]
    assert token.logprob is not None
    assert token.top == ()


MIXED = [
    row(),
    row(temperature=1.0, seed=1, logprobs=4),
    row(temperature=0.8, top_p=0.9, seed=2),
    row(temperature=1.2, top_k=50, min_p=0.01, seed=3),
    row(temperature=1.0, typical_p=0.8, seed=4, repetition_penalty=1.3),
    row(temperature=2.0, top_p=0.99, seed=5, frequency_penalty=0.4),
    row(logit_bias=((3, 9.0),), logprobs=1),
]


def test_rows_do_not_see_each_other():
    x = random_logits(len(MIXED), vocab=49152)
    together = draw(x, MIXED)
    for index, asked in enumerate(MIXED):
        assert draw(x[index : index + 1], [asked]) == [together[index]]
    assert draw(x.flip(0), MIXED[::-1]) == together[::-1]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_row_gives_nothing_and_spares_the_others(poison):
    x = random_logits(3)
    x[1, 7] = poison
    alone = draw(x[2:], [row(temperature=1.0, seed=4)])
    found = draw(x, [row(), row(temperature=1.0, logprobs=2), row(temperature=1.0, seed=4)])
    assert found[1] is None
    assert found[2] == alone[0]


@pytest.mark.parametrize("temperature", [1e-9, 1e-30, 1e-40, 5e-324])
def test_tiny_temperature_is_greedy(temperature):
    x = random_logits()
    drawn = draw(x, [row(temperature=temperature, seed=index) for index in range(4)])
    assert [token.token_id for token in drawn] == x.argmax(dim=1).tolist()


EVERYTHING_AT_ONCE = {
    "repetition_penalty": 10.0,
    "frequency_penalty": 2.0,
    "presence_penalty": -2.0,
    "top_k": 1,
    "typical_p": 1e-3,
    "top_p": 1e-6,
    "min_p": 1.0,
}


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1.0, 2.0])
@pytest.mark.parametrize(
    "extreme",
    [
        {"top_p": 5e-324},
        {"typical_p": 5e-324},
        {"min_p": 5e-324},
        {"min_p": 1.0},
        {"top_k": 2**31 - 1},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 1e-38},
        {"repetition_penalty": 10.0},
        {"frequency_penalty": -2.0, "presence_penalty": -2.0},
        {"logit_bias": tuple((token_id, -100.0) for token_id in range(VOCAB))},
        {"logit_bias": tuple((token_id, 100.0) for token_id in range(VOCAB))},
        {"seed": -(1 << 63)},
        EVERYTHING_AT_ONCE,
    ],
    ids=lambda extreme: "+".join(extreme),
)
def test_extreme_parameters_draw_a_token_of_the_vocabulary(extreme, temperature):
    """Each passes the door. A token beyond the vocabulary would end the engine process at the next step."""
    x = random_logits(3, spread=30.0)
    seen = (*x.argmax(dim=1).tolist(), *x.argmin(dim=1).tolist())
    drawn = draw(x, [row(tokens=seen, prompt_count=1, logprobs=1, temperature=temperature, **extreme)] * 3)
    assert all(0 <= token.token_id < VOCAB for token in drawn)


def test_draws_follow_the_distribution():
    """Pearson's chi-square over 20,000 seeds; 14 degrees of freedom exceed 36.1 with probability 0.001."""
    vocab, count = 15, 20_000
    logits = random_logits(1, vocab=vocab, spread=1.0)
    drawn = []
    for start in range(0, count, 500):
        rows = [row(temperature=1.0, seed=seed) for seed in range(start, start + 500)]
        drawn += [token.token_id for token in draw(logits.expand(500, vocab), rows)]
    found = torch.bincount(torch.tensor(drawn), minlength=vocab).double()
    expected = logits[0].double().softmax(-1) * count
    assert ((found - expected) ** 2 / expected).sum() < 36.1


def test_filtered_tokens_are_never_drawn():
    logits = random_logits(1, vocab=50)
    allowed = set(logits[0].topk(3).indices.tolist())
    rows = [row(temperature=5.0, top_k=3, seed=seed) for seed in range(300)]
    assert {token.token_id for token in draw(logits.expand(300, 50), rows)} == allowed


def support(logits, **sampling):
    """The tokens that 400 seeds draw from one row."""
    rows = [row(temperature=1.0, seed=seed, **sampling) for seed in range(400)]
    return {token.token_id for token in draw(logits.expand(400, -1), rows)}


@pytest.mark.parametrize(
    ("sampling", "processor"),
    [
        ({"top_k": 4}, TopKLogitsWarper(4)),
        ({"top_p": 0.6}, TopPLogitsWarper(0.6)),
        ({"min_p": 0.3}, MinPLogitsWarper(0.3)),
        ({"typical_p": 0.4}, TypicalLogitsWarper(0.4)),
    ],
    ids=["top_k", "top_p", "min_p", "typical_p"],
)
def test_draw_with_a_filter_draws_what_transformers_keeps(sampling, processor):
    logits = random_logits(1, vocab=12, spread=1.0)
    kept = (~processor(None, logits).isneginf())[0].nonzero()[:, 0].tolist()
    assert support(logits, **sampling) == set(kept) < set(range(12))


def test_draw_applies_filters_in_the_stated_order():
    logits = random_logits(1, vocab=12, spread=1.0, seed=2)
    steps = [TopKLogitsWarper(8), TypicalLogitsWarper(0.85), TopPLogitsWarper(0.85), MinPLogitsWarper(0.2)]
    kept, backwards = logits / 1.5, logits / 1.5
    for step, last in zip(steps, reversed(steps), strict=True):
        kept, backwards = step(None, kept), last(None, backwards)
    assert not same_kept(kept, backwards)
    rows = [row(temperature=1.5, seed=seed, top_k=8, typical_p=0.85, top_p=0.85, min_p=0.2) for seed in range(400)]
    drawn = {token.token_id for token in draw(logits.expand(400, -1), rows)}
    assert drawn == set((~kept.isneginf())[0].nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    ("sampling", "chosen"),
    [
        ({}, 3),
        ({"repetition_penalty": 2.0}, 5),
        ({"frequency_penalty": 0.6}, 5),
        ({"frequency_penalty": 0.4}, 3),
        ({"presence_penalty": 1.1}, 5),
        ({"presence_penalty": 0.9}, 3),
        ({"logit_bias": ((5, 1.1),)}, 5),
        ({"logit_bias": ((5, 0.9),)}, 3),
    ],
)
def test_draw_with_a_penalty_or_bias_moves_the_greedy_choice(sampling, chosen):
    """Token 3 leads token 5 by 1 and was put out twice."""
    x = torch.zeros(1, 8)
    x[0, 3], x[0, 5] = 3.0, 2.0
    assert draw(x, [row(tokens=(1, 3, 3), prompt_count=1, **sampling)])[0].token_id == chosen


def test_draw_at_a_high_temperature_is_flatter():
    logits = torch.tensor([[0.0, 5.0]])
    assert [
        len({t.token_id for t in draw(logits.expand(300, 2), [row(temperature=heat, seed=i) for i in range(300)])})
        for heat in (0.2, 2.0)
    ] == [1, 2]


@pytest.mark.parametrize("other", [(8, 0, 3), (7, 1, 3), (7, 0, 4), (7 + (1 << 40), 0, 3)])
def test_noise_depends_on_seed_choice_and_position(other):
    assert uniform(7, 0, 3) != uniform(*other)


def test_noise_of_many_draws_is_the_noise_of_each():
    draws = [(0, 0, 0), (7, 0, 3), ((1 << 64) - 1, 5, 4095), (123456789123456789, 2, 17)]
    assert uniforms(*zip(*draws, strict=True)).tolist() == [uniform(*draw) for draw in draws]


def test_noise_is_uniform_over_positions():
    values = torch.tensor([uniform(1, 0, position) for position in range(20_000)], dtype=torch.float64)
    found = torch.histc(values, bins=20, min=0, max=1)
    assert ((found - 1000) ** 2 / 1000).sum() < 43.8  # 19 degrees of freedom, 0.001


def test_score_prompt_picks_the_following_token():
    x = random_logits(2)
    expected = x.log_softmax(-1)
    found = score_prompt(x, torch.tensor([4, 9]), 0).tolist()
    assert found == [DrawnToken(4, expected[0, 4].item()), DrawnToken(9, expected[1, 9].item())]


def test_score_prompt_names_the_likeliest_tokens_best_first():
    x = random_logits(2)
    expected = x.log_softmax(-1)
    for row, token in enumerate(score_prompt(x, torch.tensor([4, 9]), 3).tolist()):
        values, ids = expected[row].sort(descending=True)
        assert [(item.token_id, item.logprob) for item in token.top] == [(ids[k].item(), values[k].item()) for k in range(3)]


def test_score_prompt_names_no_more_tokens_than_there_are():
    x = random_logits(1)
    assert len(score_prompt(x, torch.tensor([4]), 10**6).tolist()[0].top) == x.shape[1]


def random_mask(generator, row_count, vocab_size, allowed_count):
    allowed = torch.zeros(row_count, -(-vocab_size // 32) * 32, dtype=torch.bool)
    for row in range(row_count):
        allowed[row, torch.randperm(vocab_size, generator=generator)[:allowed_count]] = True
    words = np.packbits(allowed.numpy(), axis=1, bitorder="little").view(np.int32)
    return RowMask(list(range(row_count)), torch.from_numpy(words)), allowed[:, :vocab_size]


@pytest.mark.parametrize("vocab_size", [50, 4096, 5000])
@pytest.mark.parametrize("allowed_count", [1, 7, 50, 400])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "typical_p": 0.9}])
def test_masked_rows_draw_what_the_allowed_tokens_alone_would(vocab_size, allowed_count, sampling):
    generator = torch.Generator().manual_seed(vocab_size + allowed_count)
    logits = torch.randn(6, vocab_size, generator=generator) * 3
    mask, allowed = random_mask(generator, 6, vocab_size, allowed_count)
    rows = [DrawRow(Sampling(max_new_tokens=1, seed=seed, **sampling), 0, array("q", [1]), 1) for seed in range(6)]
    before = logits.clone()
    drawn = [token.token_id for token in draw(logits, rows, mask)]
    expected = [token.token_id for token in draw(logits.masked_fill(~allowed, float("-inf")), rows)]
    assert drawn == expected
    assert torch.equal(logits, before)


def test_penalties_and_bias_cannot_lift_a_forbidden_token():
    logits = torch.zeros(1, 64)
    words = torch.zeros(1, 2, dtype=torch.int32)
    words[0, 1] = 1 << 3  # token 35
    row = DrawRow(Sampling(max_new_tokens=1, logit_bias=((5, 100.0),), repetition_penalty=2.0), 0, array("q", [5, 35]), 1)
    assert draw(logits, [row], RowMask([0], words)) == [DrawnToken(35)]


def test_masked_rows_leave_the_others_and_log_probabilities_alone():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 64, generator=generator)
    mask, _ = random_mask(generator, 2, 64, 3)
    rows = [DrawRow(Sampling(max_new_tokens=1, logprobs=2), 0, array("q", [1]), 1)] * 2
    free, held = draw(logits, rows), draw(logits, rows, RowMask([1], mask.words))
    assert held[0] == free[0]
    assert held[1].top == free[1].top
    assert held[1].logprob == pytest.approx(float(logits[1].log_softmax(0)[held[1].token_id]))
