"""The fetching process of a running node dies: nobody who is served notices, and fetching comes back."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

DEMO = Path(__file__).resolve().parents[2] / "config/demo/adapters"
SHORT = {"prompt": "Four score and", "max_tokens": 4, "temperature": 0}


@pytest.fixture
def mortal(kit, tmp_path):
    running = kit.start_node(tmp_path / "node", env=kit.environment(OPENLORA_CHAIN__PROFILE="none"))
    yield running
    if running.process.poll() is None:
        running.kill()


def test_killed_fetching_process_is_replaced_while_adapters_are_served(mortal, kit):
    first = mortal.child("node.adapters.fetching.process")
    before = mortal.post("/v1/completions", {**SHORT, "model": "lincoln"}).body["choices"][0]["text"]

    os.kill(first, signal.SIGKILL)

    served = [mortal.post("/v1/completions", {**SHORT, "model": "lincoln"}) for _ in range(5)]
    assert [answer.status for answer in served] == [200] * 5
    assert {answer.body["choices"][0]["text"] for answer in served} == {before}
    added = kit.wait_for(lambda: _add(mortal), "the next fetching process", 60)
    assert "serving added" in added.stdout
    assert mortal.child("node.adapters.fetching.process") != first
    assert mortal.post("/v1/completions", {**SHORT, "model": "added"}).status == 200
    assert mortal.stop() == 0


def _add(node):
    done = node.cli("adapters", "add", str(DEMO / "reagan"), "--name", "added", check=False)
    return done if done.returncode == 0 else None
