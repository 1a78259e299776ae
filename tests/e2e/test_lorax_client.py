"""The real lorax-client 0.6.3, unmodified, in an environment of its own: it wants an older huggingface-hub than the node."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-lorax" / "bin" / "python"
SCRIPT = ROOT / "tests" / "api" / "clients" / "lorax_client.py"


@pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON} is absent; scripts/test makes it")
def test_lorax_client_works_unmodified(node):
    done = subprocess.run([str(PYTHON), str(SCRIPT), node.url, "lincoln", "reagan"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert seen["whole"]["text"] == seen["stream"]["text"] == seen["async"]
    assert (seen["whole"]["tokens"], seen["stream"]["events"]) == (8, 8)
    assert [text.split(":")[0] for text in seen["errors"]] == ["GenerationError"] * 2 + ["ValidationError"] * 2
    assert all("no-such-adapter" in text for text in seen["errors"][:2])
    assert seen["adapter"]
    assert seen["merged"]
    assert seen["adapter"] != seen["merged"], "half of each is not one of them"


@pytest.mark.parametrize(
    ("parameters", "status", "error_type"),
    [
        pytest.param({"adapter_id": "no-such-adapter", "adapter_source": "local"}, 424, "generation", id="adapter"),
        pytest.param({"max_new_tokens": 0}, 422, "validation", id="parameter"),
        pytest.param({"temperature": -1}, 422, "validation", id="temperature"),
    ],
)
def test_lorax_errors_have_its_statuses_and_shape(node, parameters, status, error_type):
    answer = node.post("/generate", {"inputs": "x", "parameters": parameters})
    assert (answer.status, answer.body["error_type"]) == (status, error_type)
    assert "x-openlora-receipt" not in answer.headers


def test_lorax_linear_merge_is_recorded_with_the_shares_of_its_weights(node):
    merge = {"ids": ["lincoln", "reagan"], "weights": [0.75, 0.25], "merge_strategy": "linear"}
    parameters = {"merged_adapters": merge, "adapter_source": "local", "max_new_tokens": 4}
    record = node.post("/generate", {"inputs": "Once", "parameters": parameters}).bundle["record"]
    assert record["recipe"]["kind"] == "linear"
    assert [adapter["share_ppm"] for adapter in record["recipe"]["adapters"]] == [750_000, 250_000]


def test_lorax_compatible_route_answers_with_a_list(node):
    answer = node.post("/", {"inputs": "Once", "parameters": {"max_new_tokens": 3}})
    assert isinstance(answer.body, list)
    assert answer.headers["x-openlora-receipt"]
