"""The wheel, installed outside the source tree and used from an empty directory: it brings everything it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel of this tree, installed without its dependencies into a directory of its own."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("target")
    build = [*PIP, "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT)]
    subprocess.run(build, check=True, timeout=200)
    [wheel] = wheels.glob("*.whl")
    subprocess.run(
        [*PIP, "install", "--quiet", "--no-index", "--no-deps", "--target", str(target), str(wheel)], check=True, timeout=200
    )
    return target


@pytest.fixture
def outside(installed, kit, tmp_path):
    """Environment and empty directory from which the installed copy is the only one that is found first."""
    return kit.environment(PYTHONPATH=str(installed), PYTHONSAFEPATH="1"), tmp_path


def _python(script: str, outside) -> str:
    env, cwd = outside
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def test_wheel_installs_two_packages_and_nothing_else(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"node", "attribution", "bin"}
    assert not {"tests", "config", "scripts", "contracts", "csrc"} & names


def test_wheel_holds_every_file_that_the_code_reads(installed):
    tree = ROOT / "node"
    data = [
        path for path in tree.rglob("*") if path.suffix in (".json", ".html", ".css", ".js", ".svg", ".toml") and path.is_file()
    ]
    assert {path.name for path in data} >= {
        "UsageEscrow.json",
        "AttributionRewards.json",
        "AdapterRegistry.json",
        "TestToken.json",
    }
    migrations = list((tree / "settlement" / "migrations").rglob("*.py"))
    modules = [path for path in tree.rglob("*.py") if "__pycache__" not in path.parts]
    assert len(migrations) >= 4
    for path in (*data, *migrations, *modules):
        assert (installed / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    for folder in ("csrc", "config/demo"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".o", ".so", ".pyc"):
                assert (installed / "node" / "_data" / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    assert (installed / "node" / "_data" / "config" / "node.toml").read_bytes() == (ROOT / "config" / "node.toml").read_bytes()


def test_wheel_is_what_python_imports_outside_the_tree(installed, outside):
    script = "import node, attribution, node.resources as r, node.kernels.build as b;"
    script += "print(node.__file__, attribution.__file__, r.data_path('config/demo/adapters'), b.source_dir(), sep='\\n')"
    places = _python(script, outside).splitlines()
    assert len(places) == 4
    for place in places:
        assert Path(place).is_relative_to(installed), place


def test_wheel_runs_doctor(installed, outside):
    env, cwd = outside
    command = [str(installed / "bin" / "openlora-node"), "doctor", "--json", "--data-dir", str(cwd / "data")]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    states = {item["subject"]: item["state"] for item in json.loads(done.stdout)}
    assert "fail" not in states.values()
    assert states["model"] == "ok"


def test_wheel_starts_a_node_that_answers_with_an_adapter_and_a_receipt(installed, outside, kit):
    env, cwd = outside
    program = str(installed / "bin" / "openlora-node")
    node = kit.start_node(cwd / "data", env=env, cwd=cwd, program=program)
    try:
        assert "adapters   lincoln, reagan, roosevelt" in node.banner
        answer = node.post("/v1/completions", {"model": "lincoln", "prompt": "Once", "max_tokens": 3})
        assert answer.status == 200, answer.body
        for pid in node.children():
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            path = next(value for value in variables if value.startswith("PYTHONPATH="))
            assert path.removeprefix("PYTHONPATH=").split(":")[0] == str(installed)
        assert node.stop() == 0
    finally:
        if node.process.poll() is None:
            node.kill()
    receipt = cwd / "receipt.json"
    receipt.write_text(json.dumps(answer.bundle))
    command = [program, "receipts", "verify", str(receipt), "--operator", node.operator]
    subprocess.run(command, env=env, cwd=cwd, check=True, timeout=60, capture_output=True)
