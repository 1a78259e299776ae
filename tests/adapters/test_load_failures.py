"""Adapters that could not be loaded a moment ago."""

from node.adapters.load_failures import FAILURE_S, REMEMBERED_FAILURES, LoadFailures
from node.adapters.residency import ResidencyState
from node.errors import AdapterInvalidError


def test_failure_is_told_for_a_moment_and_then_forgotten():
    now_s = [10.0]
    failures = LoadFailures(lambda: now_s[0])
    failures.note("x", AdapterInvalidError("it is broken"))
    found = failures.of("x")
    assert (found.state, found.message) == (ResidencyState.FAILED, "it is broken")
    assert failures.of("y") is None
    now_s[0] += FAILURE_S
    assert failures.of("x") is None


def test_only_so_many_are_remembered():
    failures = LoadFailures(lambda: 0.0)
    for index in range(REMEMBERED_FAILURES + 1):
        failures.note(str(index), AdapterInvalidError("it is broken"))
    assert failures.of("0") is None
    assert failures.of("1") is not None
