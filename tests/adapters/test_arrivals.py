"""Adapters between their files and complete pages."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from node.adapters.arrivals import Arrivals
from node.adapters.loader import AdapterPlan, Failed, Filled, Inspected, Placed
from node.errors import AdapterChangedError

PLACE, ELSEWHERE = Path("/x"), Path("/y")


class Loader:
    """Takes two jobs and ends them when the test says so."""

    job_limit = 2

    def __init__(self):
        self.inspected, self.filled, self.ended, self.waits_s = [], [], [], []

    @property
    def job_count(self):
        return len(self.inspected) + len(self.filled)

    def inspect(self, adapter_id, directory):
        self.inspected.append((adapter_id, directory))

    def fill(self, plan, pages, *, is_urgent=False):
        self.filled.append((plan, pages, is_urgent))

    def outcomes(self, wait_s=0.0):
        self.waits_s.append(wait_s)
        found, self.ended = self.ended, []
        return found


@pytest.fixture
def loader():
    return Loader()


@pytest.fixture
def arrivals(loader):
    return Arrivals(loader, lambda: 0.0)


def plan_of(adapter_id, directory=PLACE):
    return AdapterPlan(adapter_id, directory, SimpleNamespace(name=adapter_id))


def inspected(arrivals, loader, adapter_id="a"):
    assert arrivals.plan(adapter_id, PLACE) is None
    loader.ended.append(Inspected(plan_of(adapter_id)))
    assert arrivals.take() == []
    return arrivals.plan(adapter_id, PLACE)


def test_headers_are_read_once_for_a_directory(arrivals, loader):
    plan = inspected(arrivals, loader)
    assert plan == plan_of("a")
    assert loader.inspected == [("a", PLACE)]
    assert arrivals.files_of(["a", "b"]) == [plan.file]


def test_another_directory_is_read_again(arrivals, loader):
    inspected(arrivals, loader)
    assert arrivals.plan("a", ELSEWHERE) is None
    assert loader.inspected[-1] == ("a", ELSEWHERE)


def test_adapter_is_under_way_until_its_outcome_is_taken(arrivals, loader):
    plan = inspected(arrivals, loader)
    arrivals.fill(plan, [])
    assert "a" in arrivals
    assert len(arrivals) == 1
    filled = Filled(plan, 0.5)
    loader.ended.append(filled)
    assert arrivals.is_filling
    assert arrivals.take() == [filled]
    assert "a" not in arrivals
    assert not arrivals.is_filling


@pytest.mark.parametrize(
    "last", [Filled(plan_of("a"), 0.5), Failed("a", AdapterChangedError("changed"))], ids=["proven", "failed"]
)
def test_placed_adapter_is_under_way_until_its_hash_is_known(arrivals, loader, last):
    plan = inspected(arrivals, loader)
    arrivals.fill(plan, [], is_urgent=True)
    assert loader.filled == [(plan, [], True)]
    loader.ended.append(Placed(plan))
    assert arrivals.take() == [Placed(plan)]
    assert "a" in arrivals
    assert arrivals.is_filling
    loader.ended.append(last)
    assert arrivals.take(1.0) == [last]
    assert "a" not in arrivals
    assert loader.waits_s == [0.0, 0.0, 1.0]


def test_there_is_no_room_beyond_the_jobs_of_the_loader(arrivals):
    arrivals.plan("a", PLACE)
    assert arrivals.has_room
    arrivals.plan("b", PLACE)
    assert not arrivals.has_room


def test_failed_fill_gives_its_pages_up_and_is_told_to_who_asks(arrivals, loader):
    plan = inspected(arrivals, loader)
    arrivals.fill(plan, [])
    failed = Failed("a", AdapterChangedError("changed"))
    loader.ended.append(failed)
    assert arrivals.take() == [failed]
    assert arrivals.failure_of("a") is not None
    assert arrivals.files_of(["a"]) == []


def test_failed_inspection_has_no_pages_to_give_up(arrivals, loader):
    arrivals.plan("a", PLACE)
    loader.ended.append(Failed("a", AdapterChangedError("changed")))
    assert arrivals.take() == []
    assert "a" not in arrivals


def test_forgotten_adapter_is_inspected_again(arrivals, loader):
    inspected(arrivals, loader)
    arrivals.forget("a")
    assert arrivals.plan("a", PLACE) is None
