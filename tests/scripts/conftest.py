"""The benchmarks as modules, on a tiny model of the CPU: their figures mean nothing there, their rows do."""

import gc
import importlib
import json
from pathlib import Path

import pytest

from node.kernels.build import library_path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SMALL = ("--shape", "tiny", "--kv-bytes", str(64 << 20))


@pytest.fixture
def rows_of(monkeypatch, tmp_path):
    """Run a script's `main` with arguments; returns the rows of its file."""
    if library_path() is None:
        pytest.skip("the C++ kernels are not built")

    def run(script, *arguments):
        monkeypatch.syspath_prepend(str(SCRIPTS))
        monkeypatch.setattr(gc, "freeze", lambda: None)  # would outlive the test
        out = tmp_path / f"{script}.jsonl"
        importlib.import_module(script).main([*SMALL, "--files", str(tmp_path), "--brief", "--out", str(out), *arguments])
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run
