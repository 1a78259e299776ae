"""Rows of one step, given out."""

import pytest

from node.engine.draft import PROMPT_LOGPROB_ROWS, Draft
from node.engine.fairness import FairQueue


@pytest.fixture
def bench(make_running, make_sequence):
    running, queue = make_running(block_count=64, place_count=8), FairQueue()

    def start(index, **sizes):
        sequence = make_sequence(index, **sizes)
        queue.join(sequence)
        queue.take(sequence)
        running.start(sequence, [])
        return sequence

    return Draft(running, queue, row_count=16), start, queue


def test_rows_are_given_until_none_is_left(bench):
    draft, start, queue = bench
    for index in range(3):
        draft.give_chunk(start(index), draft.left())
    assert [work.count for work in draft.plan.work] == [6, 6, 4]
    assert draft.left() == 0
    assert queue.counter(draft.plan.work[0].sequence.fair_key)[1] == 16


def test_tenant_above_its_share_has_its_part_only(bench):
    draft, start, _ = bench
    draft.row_limits = {"t": 5}
    draft.give_chunk(start(0, prompt_count=40), draft.left())
    assert [work.count for work in draft.plan.work] == [5]
    assert draft.left("t") == 0
    assert draft.left("other") == 11


def test_chunk_that_has_a_share_gets_what_is_left(bench):
    draft, start, _ = bench
    sequence = start(0, prompt_count=40)
    draft.give_chunk(sequence, 4)
    draft.extend_chunk(0)
    assert draft.plan.work[0].count == draft.plan.row_count == 16
    assert len(sequence.blocks) == 4
    assert sequence.chunk_count == 1


def test_chunk_without_room_is_not_given(bench):
    draft, start, _ = bench
    hog = start(0, prompt_count=252)
    draft._running.grow(hog, 256)
    draft.give_chunk(start(1), 16)
    assert draft.plan.work == []


def test_chunk_whose_rows_all_want_logits_stays_small(bench):
    draft, start, _ = bench
    draft._row_count = 1000
    draft.give_chunk(start(0, prompt_count=200, prompt_logprobs=True), 1000)
    assert draft.plan.work[0].count == PROMPT_LOGPROB_ROWS
