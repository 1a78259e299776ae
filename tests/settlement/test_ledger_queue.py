import threading

import pytest

from node.settlement.ledger_queue import WorkQueue


def test_take_gives_what_was_put_in_order_and_no_more_than_asked():
    work = WorkQueue(8)
    work.put([1, 2])
    work.put([3])

    assert work.take(2) == [1, 2]
    assert work.take(2) == [3]
    assert work.take(2) == []


def test_put_beyond_the_limit_takes_nothing():
    work = WorkQueue(3)

    assert work.put([1, 2])
    assert not work.put([3, 4])
    assert work.take(8) == [1, 2]


@pytest.mark.parametrize("ends", [lambda work: work.put([1, 2]), lambda work: work.close()])
def test_wait_ends_when_enough_is_there_or_nothing_more_comes(ends):
    work = WorkQueue(8)
    work.put([0])
    waiting = threading.Thread(target=work.wait, args=(3, None))
    waiting.start()
    ends(work)
    waiting.join(30)

    assert not waiting.is_alive()


def test_wait_ends_when_its_time_has_passed():
    work = WorkQueue(8)
    work.wait(1, 0.0)

    assert work.take(1) == []


def test_is_ended_when_closed_and_empty():
    work = WorkQueue(8)
    work.put([1])
    assert not work.is_ended
    work.close()
    assert not work.is_ended
    work.take(1)
    assert work.is_ended


def test_put_into_a_closed_queue_takes_nothing():
    work = WorkQueue(8)
    work.close()

    assert not work.put([1])
    assert work.is_ended
