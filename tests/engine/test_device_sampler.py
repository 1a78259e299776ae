"""The device's sampler on CPU tensors against the CPU's; its kernels are tested on a GPU (`tests/kernels/cuda`)."""

from array import array

import pytest
import torch

from node.engine.device_sampler import Choice, DeviceSampler, reads_logits
from node.engine.device_shift import forbid_rows, shift
from node.engine.sampler import DrawRow, RowMask, draw
from node.kernels.head_rows import LogitTops
from node.request import Sampling

VOCAB = 3000

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
    {"logprobs": 0},
    {"frequency_penalty": -2.0, "logprobs": 5},
]


def make_rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for place, parameters in enumerate(PARAMETERS):
        tokens = torch.randint(VOCAB, (7 + place,), generator=generator).tolist()
        sampling = Sampling(max_new_tokens=9, seed=seed * 100 + place, **parameters)
        rows.append(DrawRow(sampling, place % 3, array("q", tokens + tokens[-2:]), 4))
    return rows


def random_logits(rows, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def on_device(logits, rows, mask=None, unseen=None):
    sampler = DeviceSampler(logits.shape[1], len(rows), torch.device("cpu"))
    choice = sampler.new_choice(len(rows))
    sampler.greedy(logits, choice)
    drawn = sampler.draw(logits, rows, choice.step(0), mask, unseen)
    return drawn.read(), choice


def same(ours, theirs):
    """Tokens and the order of the likeliest equal; log-probabilities to rounding."""
    for our, their in zip(ours, theirs, strict=True):
        assert (our is None) == (their is None)
        if our is not None:
            assert our.token_id == their.token_id
            assert [t.token_id for t in our.top] == [t.token_id for t in their.top]
            assert (our.logprob is None) == (their.logprob is None)
            assert our.logprob == pytest.approx(their.logprob, abs=1e-5)
            assert [t.logprob for t in our.top] == pytest.approx([t.logprob for t in their.top], abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_draw_of_mixed_rows_equals_the_cpu_sampler(seed):
    rows, logits = make_rows(seed), random_logits(len(PARAMETERS), seed)
    ours, choice = on_device(logits.clone(), rows)
    same(ours, draw(logits, rows))
    assert choice.tokens.tolist() == [token.token_id for token in ours]


def test_draw_changes_no_row_but_greedy_ones_with_penalties_or_a_bias():
    rows, logits = make_rows(), random_logits(len(PARAMETERS))
    before = logits.clone()
    on_device(logits, rows)
    changed = [place for place in range(len(rows)) if not torch.equal(logits[place], before[place])]
    assert [PARAMETERS[place] for place in changed] == [{"repetition_penalty": 1.7}, {"logit_bias": ((5, 60.0), (9, -3.0))}]


def test_draw_ties_take_the_lowest_index():
    logits = torch.zeros(3, 8)
    logits[:, 2] = logits[:, 5] = 1.0
    rows = [
        DrawRow(Sampling(max_new_tokens=1, logit_bias=bias), 0, array("q", [1]), 1) for bias in ((), ((5, 0.0),), ((3, 1.0),))
    ]
    assert [token.token_id for token in on_device(logits, rows)[0]] == [2, 2, 2]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_draw_of_non_finite_rows_is_none_and_spares_the_others(poison):
    rows, logits = make_rows(), random_logits(len(PARAMETERS))
    expected = draw(logits, rows)
    for place in (0, 3, 6, 9):
        logits[place, 11] = poison
        expected[place] = None
    ours, choice = on_device(logits.clone(), rows)
    same(ours, expected)
    assert ((choice.tokens >= 0) & (choice.tokens < VOCAB)).all()


def test_draw_with_masks_equals_the_cpu_sampler():
    rows, logits = make_rows(), random_logits(len(PARAMETERS))
    words = torch.randint(-(1 << 31), 1 << 31, (len(rows), -(-VOCAB // 32)), generator=torch.Generator().manual_seed(1))
    mask = RowMask([0, 1, 4, 7, 9], words.to(torch.int32))
    ours, _ = on_device(logits.clone(), rows, mask)
    same(ours, draw(logits, rows, mask))
    for place in mask.rows:
        token = ours[place].token_id
        assert int(mask.words[place, token // 32]) >> (token % 32) & 1


def test_draw_with_unseen_tokens_equals_rows_that_hold_them():
    rows, logits = make_rows(), random_logits(len(PARAMETERS))
    unseen = torch.arange(len(rows)) * 7 + 1
    complete = [
        DrawRow(row.sampling, row.choice_index, row.tokens + array("q", [token]), row.prompt_count)
        for row, token in zip(rows, unseen.tolist(), strict=True)
    ]
    ours, _ = on_device(logits.clone(), rows, unseen=unseen)
    same(ours, draw(logits, complete))


def test_draw_twice_gives_the_same_tokens():
    rows, logits = make_rows(3), random_logits(len(PARAMETERS), 3)
    assert on_device(logits.clone(), rows)[0] == on_device(logits.clone(), rows)[0]


def test_shift_of_plain_rows_changes_nothing():
    logits = random_logits(2)
    before = logits.clone()
    shift(logits, [DrawRow(Sampling(max_new_tokens=1, temperature=1.0), 0, array("q", [1, 2]), 1)] * 2, None)
    assert torch.equal(logits, before)


def test_forbid_rows_takes_the_words_of_the_rows_it_was_given():
    x = torch.zeros(2, 40)
    words = torch.zeros(4, 2, dtype=torch.int32)
    words[3, 1] = 1 << 2  # token 34
    forbid_rows(x, RowMask([3], words), [1, 3])
    assert x[0].isfinite().all()
    assert x[1].isfinite().nonzero()[:, 0].tolist() == [34]


def test_tops_give_what_the_logits_give():
    logits = random_logits(6)
    logits[1, [100, 2000]] = 50.0
    logits[2, 17], logits[3, 2999], logits[4] = float("nan"), float("inf"), float("-inf")
    best = [part.max(dim=1) for part in logits.split(999, dim=1)]
    values, columns = torch.stack([part.values for part in best], 1), torch.stack([part.indices for part in best], 1)
    parts = torch.stack([values.view(torch.int32), (columns + 999 * torch.arange(4)).int()], dim=2)
    sampler = DeviceSampler(VOCAB, 6, torch.device("cpu"))
    found, expected = sampler.new_choice(6), sampler.new_choice(6)
    sampler.greedy(logits, expected)
    sampler.greedy(torch.full_like(logits, float("nan")), found, LogitTops(torch.zeros(6, dtype=torch.int32), parts))
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.answers.tolist() == expected.answers.tolist()
    assert expected.answers[0, 1:5].tolist() == [100, -1, -1, -1]


def test_rows_that_do_not_read_logits_are_drawn_without_them():
    rows, logits = make_rows(), random_logits(len(PARAMETERS))
    mask = RowMask([1, 4], torch.randint(-(1 << 31), 1 << 31, (len(rows), -(-VOCAB // 32))).int())
    sampler = DeviceSampler(VOCAB, len(rows), torch.device("cpu"))
    choice = sampler.new_choice(len(rows))
    sampler.greedy(logits, choice)
    expected = sampler.draw(logits.clone(), rows, choice.step(0), mask).read()
    sampler.greedy(logits, choice)
    for index, row in enumerate(rows):
        if not reads_logits(row.sampling, has_grammar=index in mask.rows):
            logits[index] = float("nan")
    assert logits.isnan().any()
    assert sampler.draw(logits, rows, choice.step(0), mask).read() == expected


def test_answers_of_a_step_stay_while_the_next_ones_draw():
    turn = torch.zeros(1, dtype=torch.int32)
    choice = Choice.of(torch.zeros(3, dtype=torch.int32), turn, turns=2)
    sampler = DeviceSampler(VOCAB, 3, torch.device("cpu"))
    expected = []
    for step in range(3):
        logits = random_logits(3, step)
        logits[step] = float("nan")
        turn.fill_(step % 2)
        sampler.greedy(logits, choice)
        expected.append(logits.nan_to_num(-9).argmax(dim=1).tolist())
        assert choice.tokens.tolist() == [0 if row == step else token for row, token in enumerate(expected[step])]
        for kept in range(max(0, step - 1), step + 1):
            answers = choice.step(kept % 2).answers.tolist()
            assert answers == [-1 if row == kept else token for row, token in enumerate(expected[kept])]
