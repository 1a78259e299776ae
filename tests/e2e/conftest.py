"""A whole node, started as an operator starts it, for the tests that use it from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [str(Path(sys.executable).parent / "openlora-node")]
START_TIMEOUT_S = 180.0


@dataclass
class RunningNode:
    """A started node: its process, its address and where it keeps its data."""

    process: subprocess.Popen[str]
    url: str
    data_dir: Path
    banner: str

    def get(self, path: str, **headers: str) -> Any:
        return self.call("GET", path, None, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Any:
        return self.call("POST", path, body, **headers)

    def call(self, method: str, path: str, body: Any, **headers: str) -> Any:
        """Return the parsed answer; an HTTP error is returned as (status, body)."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json", **headers}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())
        return json.loads(text) if text.startswith(("{", "[")) else text

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command against this node's data directory."""
        return run_cli(*arguments, "--data-dir", str(self.data_dir), check=check)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


def run_cli(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300, check=check, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "NO_COLOR": "1", "COLUMNS": "200"}


def start_node(data_dir: Path, *options: str) -> RunningNode:
    """Start a node on a free port and wait for its banner."""
    command = [*COMMAND, "start", "--port", "0", "--data-dir", str(data_dir), *options]
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "stderr.log").open("a") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment())
    assert process.stdout is not None
    banner, deadline = "", time.monotonic() + START_TIMEOUT_S
    while "operator" not in banner:
        line = process.stdout.readline()
        if not line or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"no banner; stderr ends with:\n{(data_dir / 'stderr.log').read_text()[-4000:]}")
        banner += line
    url = re.search(r"http://[\d.]+:\d+", banner)
    assert url, banner
    return RunningNode(process, url[0], data_dir, banner)


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    """One node for every test that does not break it."""
    running = start_node(tmp_path_factory.mktemp("node"))
    yield running
    assert running.stop() == 0
