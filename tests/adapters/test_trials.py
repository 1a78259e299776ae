"""The adapter that steps compute with before its hash is known."""

from pathlib import Path

import pytest

from node.adapters.loader import AdapterPlan, Failed
from node.adapters.residency import ResidencyState
from node.adapters.trials import Trials
from node.errors import AdapterChangedError
from tests.adapters.test_pool_tiers import file_plan
from tests.adapters.test_residents import Bench


class Trial:
    """Adapters "a" and "b", resident and placed."""

    def __init__(self):
        self.bench = Bench()
        self.residents = self.bench.residents
        self.trials = Trials(self.residents)
        for name in ("a", "b"):
            self.bench.admit(name)
            self.trials.place(AdapterPlan(name, Path("/adapters"), file_plan(4)))


@pytest.fixture
def trial():
    return Trial()


def test_adapter_on_trial_stays_until_it_is_proven(trial):
    trial.trials.begin("a")
    assert not trial.trials.is_proven("a")
    assert trial.residents.is_pinned("a")
    trial.trials.prove("a")
    assert trial.trials.is_proven("a")
    assert not trial.residents.is_pinned("a")
    assert not trial.trials.has_any
    assert trial.trials.placed("a") is None


def test_second_adapter_cannot_be_on_trial(trial):
    trial.trials.begin("a")
    with pytest.raises(ValueError, match="on trial"):
        trial.trials.begin("b")
    assert not trial.residents.is_pinned("b")


def test_refused_adapter_is_remembered_until_nobody_holds_it(trial):
    trial.trials.begin("a")
    trial.residents.pin("a")  # a sequence, or its copy
    trial.trials.refuse(Failed("a", AdapterChangedError("changed")))
    trial.trials.drop_refused()
    assert trial.trials.refused["a"].state is ResidencyState.FAILED
    assert not trial.trials.is_proven("a")
    trial.residents.unpin("a")
    trial.trials.drop_refused()
    assert not trial.trials.has_any
    assert trial.bench.left == ["a"]


def test_failure_of_an_adapter_that_was_not_on_trial_is_not_remembered(trial):
    trial.trials.refuse(Failed("a", AdapterChangedError("changed")))
    assert not trial.trials.has_any
    assert trial.trials.placed("a") is None
    assert "a" in trial.residents
