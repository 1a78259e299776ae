"""Which work shares a commit. What a commit holds is tested through the ledger."""

import os
import threading
import time

import pytest

from attribution.fees import Payees, Price, SplitPolicy
from attribution.signing import LocalSigner
from node.errors import LedgerError, OverloadedError
from node.settlement import ledger_writer
from node.settlement.admission import Admission, open_request
from node.settlement.ledger_store import LedgerStore, WriterOptions
from node.settlement.ledger_writer import LEAST_GROUP, MAX_GROUP, Admit, least_group

SIGNER = LocalSigner(b"\x07" * 32)
HOUR_MS = 3_600_000.0
PATIENCE_S = 60.0  # never waited for where things are right


class Seen:
    """How many answers each group of work had."""

    def __init__(self):
        self.groups = []
        self.answers = 0
        self.changed = threading.Condition()

    def answered(self, result, error):
        assert error is None
        self.answers += 1

    def settled(self):
        with self.changed:
            self.groups.append(self.answers)
            self.answers = 0
            self.changed.notify_all()

    def wait_for_groups(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.groups) >= count, PATIENCE_S)


@pytest.fixture
def seen():
    return Seen()


@pytest.fixture
def make(tmp_path, seen):
    opened = []

    def build(**options):
        url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
        settings = WriterOptions(**options)
        clock_ms = lambda: time.time_ns() // 10**6  # noqa: E731
        opened.append(LedgerStore.open(url, settings, signer=SIGNER, chain_id=1, clock_ms=clock_ms, settled=seen.settled))
        return opened[-1]

    yield build
    for store in opened:
        store.close()


def admits(seen, *names):
    for name in names:
        admission = Admission(
            request_id=name,
            tenant="tenant",
            base_id="b" * 64,
            prompts=[[1, 2]],
            terms=(),
            contributions=(),
            price=Price("10", "100"),
            policy=SplitPolicy(500_000, 200_000, 300_000),
            payees=Payees(SIGNER.address, SIGNER.address),
        )
        opened = open_request(
            admission, operator=SIGNER.address, admitted_ms=1, tenant_salt=b"\x01" * 32, random_bytes=os.urandom
        )
        yield Admit(opened, seen.answered)


def test_put_at_once_shares_a_commit_that_waits_for_nobody(make, seen):
    store = make(group_commit_ms=HOUR_MS)
    store.writer.put(*admits(seen, "a", "b", "c"))
    seen.wait_for_groups(1)

    assert seen.groups == [3]


def test_put_behind_a_commit_that_has_just_begun_waits_for_company(make, seen):
    store = make(group_commit_ms=HOUR_MS)
    store.writer.put(*admits(seen, "a"))
    seen.wait_for_groups(1)
    store.writer.put(*admits(seen, "b"))
    store.writer.put(*admits(seen, "c", "d"))
    store.close()

    assert seen.groups == [1, 3]


def test_put_without_a_pause_between_commits_waits_for_nobody(make, seen):
    store = make(group_commit_ms=0.0)
    for count, name in enumerate(("a", "b", "c"), start=1):
        store.writer.put(*admits(seen, name))
        seen.wait_for_groups(count)

    assert seen.groups == [1, 1, 1]


def test_put_more_than_may_wait_is_refused_whole(make, seen):
    store = make(queue_limit=2)
    with pytest.raises(OverloadedError, match="2 pieces"):
        store.writer.put(*admits(seen, "a", "b", "c"))
    store.writer.put(*admits(seen, "d", "e"))
    seen.wait_for_groups(1)

    assert seen.groups[0] == 2


def test_put_after_the_end_is_refused(make, seen):
    store = make()
    store.close()

    with pytest.raises(LedgerError, match="closed"):
        store.writer.put(*admits(seen, "a"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_defect_of_the_writer_leaves_nobody_waiting(make, seen, monkeypatch):
    def fail(group, request):
        raise RuntimeError("a defect")

    monkeypatch.setattr(ledger_writer.Group, "admit", fail)
    store, problems = make(), []
    crowd = [Admit(item.request, lambda result, error: problems.append(error)) for item in admits(seen, *map(str, range(100)))]
    store.writer.put(*crowd)
    seen.wait_for_groups(1)

    assert len(problems) == 100
    assert all(isinstance(problem, LedgerError) for problem in problems)
    with pytest.raises(LedgerError, match="closed"):
        store.writer.put(*admits(seen, "late"))


def test_put_a_crowd_is_answered_half_by_half(make, seen, monkeypatch):
    monkeypatch.setattr(ledger_writer, "least_group", lambda *measured: LEAST_GROUP)
    store = make(group_commit_ms=HOUR_MS)
    store.writer.put(*admits(seen, *(f"r{index}" for index in range(1024))))
    store.close()

    assert seen.groups == [MAX_GROUP, MAX_GROUP, MAX_GROUP, 128, 64, 32, 16, 8, LEAST_GROUP]


def test_put_where_commits_are_slow_is_answered_at_once(make, seen, monkeypatch):
    monkeypatch.setattr(ledger_writer, "least_group", lambda *measured: 100)
    store = make(group_commit_ms=0.0)
    store.writer.put(*admits(seen, "first"))
    seen.wait_for_groups(1)
    store.writer.put(*admits(seen, *(f"r{index}" for index in range(100))))
    store.close()

    assert seen.groups == [1, 100]


@pytest.mark.parametrize(
    ("commit_s", "least"), [(0.0, LEAST_GROUP), (0.001, LEAST_GROUP), (0.004, 32), (0.0041, 33), (1.0, MAX_GROUP)]
)
def test_least_group_takes_as_long_as_its_commit(commit_s, least):
    assert least_group(32, 0.004, commit_s) == least


def test_least_group_after_work_that_took_no_time_is_the_largest():
    assert least_group(1, 0.0, 0.001) == MAX_GROUP
