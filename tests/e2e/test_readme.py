"""Every fenced command of the README runs. `scripts/test` alone is left out: it is what runs this file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SERVED_AT = "http://127.0.0.1:8080"
START = ".venv/bin/openlora-node start"
NOT_HERE = "scripts/test"
TIMEOUT_S = 280


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def _commands() -> list[str]:
    """The shell commands, continued lines joined: a command ends where no quote is open."""
    commands, current = [], ""
    for line in "".join(_blocks("bash")).splitlines(keepends=True):
        current += line
        if current.count("'") % 2 == 0 and current.strip():
            commands.append(current.strip())
            current = ""
    return [command for command in commands if not command.startswith(NOT_HERE)]


def _environment(data_dir: Path) -> dict[str, str]:
    return {**os.environ, "OPENLORA_DATA_DIR": str(data_dir), "OPENLORA_SERVER__PORT": "0", "HF_HUB_OFFLINE": "1"}


def _shell(command: str, data_dir: Path, working_dir: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-ec", command],
        cwd=working_dir,
        env=_environment(data_dir),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory in which the README's relative paths work and its files do no harm."""
    for name in (".venv", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_readme_shows_its_two_commands_first() -> None:
    first_code_line = next(number for number, line in enumerate(README.splitlines(), 1) if line.startswith("```"))
    assert first_code_line < 20
    assert _blocks("bash")[0].split()[0] == "scripts/demo"
    assert "DEMO_OUTPUT" not in README
    assert "FIGURES" not in README


def test_readme_demo_command_tells_the_whole_story(tmp_path: Path) -> None:
    [command] = [command for command in _commands() if command.startswith("scripts/demo")]
    done = _shell(command, tmp_path / "data", ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "one decode step held 3 adapters" in done.stdout
    assert re.search(r"sum ([\d,]+) wei == \1 wei paid", done.stdout)


def test_readme_start_command_serves(tmp_path: Path) -> None:
    assert START in _commands()
    process = subprocess.Popen(
        ["bash", "-c", f"exec {START}"], cwd=ROOT, env=_environment(tmp_path), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "serves at http://127.0.0.1:" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    assert process.wait(60) == 0


def test_readme_commands_run_in_order_against_a_node(node: Any, place: Path) -> None:
    operator = re.search(r"operator +(0x[0-9a-fA-F]{40})", node.banner)
    assert operator
    served = [command for command in _commands() if command != START and not command.startswith("scripts/")]
    assert served
    for command in served:
        done = _shell(command.replace(SERVED_AT, node.url).replace("OPERATOR", operator[1]), node.data_dir, place)
        # A warning of the doctor (a busy port, say) is exit 1; that the command ran is what is asked here.
        assert done.returncode == 0 or (command.endswith("doctor") and done.returncode == 1), (command, done.stdout, done.stderr)
    assert "choices" in (place / "answer.json").read_text()


@pytest.mark.parametrize("code", _blocks("python"))
def test_readme_python_runs_against_a_node(node: Any, place: Path, code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code.replace(SERVED_AT, node.url)], cwd=place, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
