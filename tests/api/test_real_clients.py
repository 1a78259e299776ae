"""The real `openai` SDK and the real lorax-client, each in a process of its own, against the API on a socket."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = Path(__file__).parent / "clients"
LORAX_PYTHON = ROOT / ".venv-lorax" / "bin" / "python"


def run_client(python: str, script: str, *arguments: str) -> dict:
    done = subprocess.run([python, str(CLIENTS / script), *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_openai_sdk_works_unmodified(bench, live_url):
    seen = run_client(sys.executable, "openai_client.py", live_url, "tiny-base", "alice")
    assert seen["models"] == ["tiny-base", "alice", "org/bob"]
    assert seen["chat"]["text"] == "hello world"
    assert seen["errors"] == {
        "unknown model": [404, "model_not_found", "model"],
        "bad parameter": [400, "invalid_request", "temperature"],
        "response format": [400, "invalid_request", "response_format.type"],
    }
    assert len(bench.books.opened) == len(bench.books.closed)


@pytest.mark.skipif(not LORAX_PYTHON.exists(), reason=f"{LORAX_PYTHON} is absent; scripts/test makes it")
def test_lorax_client_works_unmodified(bench, live_url):
    seen = run_client(str(LORAX_PYTHON), "lorax_client.py", live_url, "alice", "org/bob")
    assert seen["whole"]["text"] == seen["stream"]["text"] == seen["async"] == "hello world"
    assert seen["whole"]["finish"].endswith("EndOfSequenceToken")
    assert [text.split(":")[0] for text in seen["errors"]] == ["GenerationError"] * 2 + ["ValidationError"] * 2
    assert seen["merged"] == "hello world"
    assert len(bench.books.opened) == len(bench.books.closed)
