"""A process of our own: its pipes, its last words, its end."""

import logging

import pytest

from node.child_process import ChildProcess
from node.errors import NodeError

STUBBORN = """
import signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
signal.pause()
"""


@pytest.fixture
def module(tmp_path):
    """Makes a module that a child can run."""

    def make(source):
        (tmp_path / "made_for_this_test.py").write_text(source)
        return "made_for_this_test", {"PYTHONPATH": str(tmp_path)}

    return make


async def test_child_answers_what_it_is_told_and_goes_when_its_input_ends():
    child = await ChildProcess.start("json.tool", has_output=True)
    child.input.write(b'{"a": 1}')
    child.input.close()
    assert await child.output.read() == b'{\n    "a": 1\n}\n'
    assert await child.wait() == 0
    assert not child.is_running


async def test_last_words_of_a_child_that_fails_are_kept_and_logged(caplog):
    with caplog.at_level(logging.INFO, "json.tool"):
        child = await ChildProcess.start("json.tool", has_output=True)
        child.input.write(b"{")
        child.input.close()
        assert await child.wait() == 1
    assert "Expecting property name" in child.log_tail
    assert "Expecting property name" in caplog.text


async def test_line_of_a_child_is_logged_at_the_level_that_it_begins_with(module, caplog):
    name, environment = module("import sys\nsys.stderr.write('WARNING kernels: not built\\nTraceback\\nINFO all: well\\n')\n")
    with caplog.at_level(logging.INFO, name):
        child = await ChildProcess.start(name, environment=environment)
        await child.wait()
    levels = [record.levelno for record in caplog.records if record.name == name]
    assert levels == [logging.WARNING, logging.INFO, logging.INFO]


async def test_child_that_ends_with_its_input_is_not_signalled(module):
    name, environment = module("import sys\nsys.stdin.read()\nsys.stderr.write('all done')\n")
    child = await ChildProcess.start(name, environment=environment)
    await child.stop(grace_s=30.0)
    assert await child.wait() == 0
    assert child.log_tail == "all done"


async def test_child_that_ignores_the_request_is_killed(module, monkeypatch):
    monkeypatch.setattr("node.child_process.STOP_TIMEOUT_S", 0.2)
    name, environment = module(STUBBORN)
    child = await ChildProcess.start(name, has_output=True, environment=environment)
    assert await child.output.readline() == b"ready\n"
    await child.stop()
    assert await child.wait() == -9


async def test_output_that_was_not_asked_for_is_an_error():
    child = await ChildProcess.start("json.tool")
    with pytest.raises(NodeError, match="without an output"):
        _ = child.output
    await child.stop()
