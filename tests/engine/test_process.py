"""The entry of the engine process, on this thread: what it says first."""

import logging

import pytest

from node.config import AdapterSettings, EngineSettings, ModelSettings
from node.engine import process
from node.engine.launch import LaunchConfig
from node.engine.messages import Ready, Shutdown, StartFailed
from node.kernels import compiled
from node.start_notes import no_notes


class Channel:
    """Tells the loop to stop at once, and keeps what it says."""

    is_blocked = False

    def __init__(self):
        self.sent = []

    def receive(self, timeout_s):
        return [Shutdown()]

    def send(self, event):
        self.sent.append(event)

    def ring(self):
        pass


@pytest.fixture
def serve(world, tmp_path):
    """Serve until the shutdown that comes at once; returns exit status and the first word."""

    def run(model=world.model_dir, **engine):
        config = LaunchConfig(
            model=ModelSettings(path=str(model), dtype="float32").model_dump(mode="json"),
            engine=EngineSettings(**{"threads": 1, "kv_cache_bytes": 1 << 20, **engine}).model_dump(mode="json"),
            adapters=AdapterSettings(memory_bytes=4 << 20).model_dump(mode="json"),
            runtime_dir=str(tmp_path),
            state_dir=str(tmp_path),
            high_water_mark=8,
        )
        channel = Channel()
        return process._serve(config, channel, no_notes), channel.sent[0]

    return run


def test_engine_without_compiled_kernels_warns_and_serves(serve, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "library_path", lambda: None)
    caplog.set_level(logging.WARNING)
    status, ready = serve()
    assert (status, type(ready), ready.kernels) == (0, Ready, "reference")
    assert "the torch reference runs" in caplog.text


def test_engine_that_was_asked_for_the_reference_does_not_warn(serve, caplog):
    caplog.set_level(logging.WARNING)
    assert serve(kernels="reference")[1].kernels == "reference"
    assert "the torch reference runs" not in caplog.text


def test_engine_that_insists_on_compiled_kernels_names_the_remedy(serve, monkeypatch):
    monkeypatch.setattr(compiled, "library_path", lambda: None)
    status, word = serve(kernels="cpp")
    assert (status, type(word), word.kind) == (process.EXIT_START_FAILED, StartFailed, "ConfigError")
    assert "python -m node.kernels.build" in word.message


def test_engine_without_its_model_says_why_it_fails(serve, tmp_path):
    status, word = serve(model=tmp_path / "none")
    assert (status, word.kind, word.code) == (process.EXIT_START_FAILED, "ModelLoadError", "model_not_found_on_disk")
