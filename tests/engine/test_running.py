"""Places, blocks and adapters of the sequences that run."""

import pytest


@pytest.fixture
def running(make_running):
    return make_running(block_count=6, place_count=2)


def test_sequences_keep_their_order_of_arrival(running, make_sequence):
    for index in (2, 0, 1):
        running.start(make_sequence(index), [])
    assert [sequence.arrival_index for sequence in running] == [0, 1, 2]
    assert running.last.arrival_index == 2
    assert not running.has_place


def test_oldest_is_never_among_those_that_may_give_way(running, make_sequence):
    sequences = [make_sequence(index) for index in range(3)]
    for sequence in sequences:
        running.start(sequence, [])
    assert running.after() == sequences[1:]
    assert running.after(sequences[0]) == sequences[1:]
    assert running.after(sequences[2]) == sequences[2:]


def test_grow_takes_all_blocks_or_none(running, make_sequence):
    sequence = make_sequence(0)
    running.start(sequence, [])
    assert running.owed_blocks() == 2
    assert not running.grow(sequence, 25)
    assert len(sequence.blocks) == 0
    assert running.room(sequence) == 24
    assert running.grow(sequence, 9)
    assert len(sequence.blocks) == 3
    assert running.owed_blocks() == -1


def test_stop_gives_everything_back_once(running, make_sequence):
    sequence = make_sequence(0)
    running.start(sequence, [])
    running.grow(sequence, 6)
    running.stop(sequence)
    assert running._adapters.count == 0
    assert running._blocks.used_count == 0
    assert sequence not in running


def test_adapters_of_an_ending_sequence_are_let_go_once(running, make_sequence):
    ending, other = make_sequence(0, new=1), make_sequence(1, new=2)
    for sequence in (ending, other):
        running.start(sequence, [])
        sequence.pending_count = 1
    running.let_go_of_adapters()
    running.let_go_of_adapters()
    assert running._adapters.count == 1
    running.stop(ending)
    assert running._adapters.count == 1
    running.stop(other)
    assert running._adapters.count == 0
