"""Starting, refusing, losing the engine, draining: the life of a node process."""

from __future__ import annotations

import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from attribution import receipt

pytestmark = pytest.mark.e2e

PROMPT = "Fellow citizens, the state of our Union is"
LONG = {"model": "lincoln", "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "stream": True}
SHORT = {"model": "reagan", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def mortal(kit, tmp_path_factory):
    """A node of its own, without a chain, that these tests break and finally stop."""
    running = kit.start_node(tmp_path_factory.mktemp("mortal"), env=kit.environment(OPENLORA_CHAIN__PROFILE="none"))
    yield running
    if running.process.poll() is None:
        running.kill()


def _request_id(stream):
    return {name.lower(): value for name, value in stream.headers.items()}["x-openlora-receipt"]


def test_banner_says_where_everything_is(node):
    for part in (
        f"serves at {node.url}",
        "model      smollm2-135m-instruct (bfloat16, cpu, ",
        "adapters   lincoln, reagan, roosevelt",
        f"data       {node.data_dir}",
        f"chain      embedded, chain id 31611, {node.rpc_url}",
        f"operator   {node.operator}",
    ):
        assert part in node.banner
    assert "not served" not in node.banner
    assert node.url.startswith("http://127.0.0.1:")


def test_first_start_makes_keystore_files_and_a_password_only_its_owner_can_read(node):
    keys = node.data_dir / "keys"
    assert {path.name for path in keys.iterdir()} >= {"operator.json", "submitter.json", "payout.json", "password"}
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    for path in keys.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    password = (keys / "password").read_text().strip()
    everything = node.banner + node.log + " ".join(node.children().values())
    assert len(password) >= 32
    assert password not in everything
    assert stat.S_IMODE((node.data_dir / "run").stat().st_mode) == 0o700


def test_health_is_empty_and_200_once_a_token_was_made(node):
    for path in ("/health", "/ping"):
        answer = node.get(path)
        assert (answer.status, answer.body) == (200, "")


def test_second_node_on_the_same_data_is_refused_and_the_first_goes_on(node, kit):
    second = kit.run_cli("start", "--port", "0", "--data-dir", str(node.data_dir), check=False)
    assert second.returncode == 75
    assert str(node.data_dir) in second.stderr
    assert "--data-dir" in second.stderr
    assert node.post("/v1/completions", SHORT).status == 200


def test_second_node_without_a_chain_is_refused_by_the_ledger(mortal, kit):
    second = kit.run_cli("start", "--port", "0", "--data-dir", str(mortal.data_dir), check=False, env=mortal.env)
    assert second.returncode == 75
    assert "ledger_locked" in second.stderr


def test_adapter_added_while_running_is_served_under_its_name(mortal, tmp_path):
    source = mortal.cli("adapters", "show", "lincoln").stdout
    directory = source.partition('"directory": "')[2].partition('"')[0]
    added = mortal.cli("adapters", "add", directory, "--name", "honest-abe")
    assert "serving honest-abe" in added.stdout
    same = [
        mortal.post("/v1/completions", {**SHORT, "model": name}).body["choices"][0]["text"] for name in ("lincoln", "honest-abe")
    ]
    assert same[0] == same[1]
    refused = mortal.cli("adapters", "add", str(tmp_path), check=False)
    assert refused.returncode == 65
    assert "adapter_format_unsupported" in refused.stderr


def test_api_process_imports_no_torch():
    script = (
        "import sys, node.app, node.cli.main; print(sorted(name for name in sys.modules if name.partition('.')[0] == 'torch'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_running_api_process_has_no_torch_in_its_memory(node):
    maps = Path(f"/proc/{node.process.pid}/maps").read_text()
    assert "/torch/" not in maps
    engine = node.child("node.engine.process")
    assert "/torch/" in Path(f"/proc/{engine}/maps").read_text()


def test_killed_engine_ends_requests_with_an_error_and_a_record_then_serves_again(mortal, kit):
    before = mortal.post("/v1/completions", SHORT).body["choices"][0]["text"]
    with mortal.stream("/v1/completions", LONG) as stream:
        events = iter(stream)
        first = next(events)
        engine = mortal.child("node.engine.process")
        subprocess.run(["kill", "-9", str(engine)], check=True)
        rest = list(events)
    assert first["choices"][0]["text"]
    assert rest[-1]["error"]["code"] == "engine_unavailable"
    refused = kit.wait_for(lambda: (a := mortal.post("/v1/completions", SHORT)).status == 503 and a, "a refusal", 10)
    assert refused.body["error"]["code"] == "engine_unavailable"
    assert int(refused.headers["retry-after"]) >= 1
    unwell = mortal.get("/health")
    assert (unwell.status, unwell.body["error_type"]) == (503, "healthcheck")
    record = receipt.verify(mortal.receipt(_request_id(stream)), [mortal.operator]).record
    assert (record.status, record.fee_wei) == ("failed", "0")
    kit.wait_for(lambda: mortal.get("/health").status == 200, "the new engine", 120)
    assert mortal.child("node.engine.process") != engine
    assert mortal.post("/v1/completions", SHORT).body["choices"][0]["text"] == before


def test_sigterm_lets_a_running_stream_finish_refuses_new_requests_and_exits_0(mortal, kit):
    kit.wait_for(lambda: mortal.get("/health").status == 200, "a ready engine", 120)
    seen = {}

    def stop():
        seen["exit"] = mortal.stop()

    with mortal.stream("/v1/completions", LONG) as stream:
        events = iter(stream)
        next(events)
        stopping = threading.Thread(target=stop)
        stopping.start()
        refused = kit.wait_for(lambda: (a := mortal.post("/v1/completions", SHORT)).status == 503 and a, "a refusal", 20)
        rest = list(events)
    stopping.join(60)
    assert refused.body["error"]["code"] == "draining"
    assert int(refused.headers["retry-after"]) >= 1
    assert rest[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    record = receipt.verify(rest[-1]["openlora"]["receipt"], [mortal.operator]).record
    assert record.status == "ok"
    assert seen["exit"] == 0
    assert not (mortal.data_dir / "run" / "admin.sock").exists()
