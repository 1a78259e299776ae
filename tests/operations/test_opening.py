"""What comes before the rooms: it must import none of them, and end what it began."""

import subprocess
import sys

import pytest

from node import opening
from node.config import Settings
from node.errors import ConfigError, LedgerError
from node.opening import open_node

HEAVY = ("node.app", "node.api", "node.settlement", "web3", "sqlalchemy", "aiohttp", "torch", "eth_utils")


@pytest.fixture
def settings(tmp_path):
    return Settings(data_dir=tmp_path)


@pytest.fixture
def engines(monkeypatch):
    """Engines that never start; returns what became of each."""
    made = []

    class Engine:
        def __init__(self, settings, runtime_dir):
            self.is_closed = False
            made.append(self)

        async def start(self):
            raise LedgerError("not heard of")

        async def close(self):
            self.is_closed = True

    monkeypatch.setattr(opening, "EngineClient", Engine)
    return made


def test_what_starts_the_engine_imports_no_room():
    script = f"import sys, node.cli.main, node.opening; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


async def test_exposed_node_is_refused_before_its_engine_begins(settings, engines):
    settings = settings.model_copy(update={"server": settings.server.model_copy(update={"host": "0.0.0.0"})})
    with pytest.raises(ConfigError, match="reachable from other machines"):
        async with open_node(settings):
            pass
    assert not engines


async def test_engine_is_closed_when_a_room_cannot_be_imported(settings, engines, monkeypatch):
    def fail(name):
        raise ImportError(name)

    monkeypatch.setattr(opening.importlib, "import_module", fail)
    with pytest.raises(ImportError):
        async with open_node(settings):
            pass
    assert [engine.is_closed for engine in engines] == [True]


async def test_engine_that_fails_at_once_is_heard_before_keys_are_made(settings, engines, monkeypatch):
    monkeypatch.setattr(opening.importlib, "import_module", lambda _: None)
    with pytest.raises(LedgerError, match="not heard of"):
        async with open_node(settings):
            pass
    assert [engine.is_closed for engine in engines] == [True]
    assert not (settings.data_dir / "keys").exists()
