"""The common script (clients/common.py) with the real `openai` SDK, LangChain and lorax-client against a started node."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from tests.e2e.clients.common import SCHEMA, TOKENS

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).parent / "clients" / "common.py"
LORAX_PYTHON = Path(__file__).parents[2] / ".venv-lorax" / "bin" / "python"
BASE = "smollm2-135m-instruct"
CLIENTS = [
    "openai",
    pytest.param(
        "langchain",
        marks=pytest.mark.skipif(importlib.util.find_spec("langchain_openai") is None, reason="langchain-openai is absent"),
    ),
    pytest.param("lorax", marks=pytest.mark.skipif(not LORAX_PYTHON.exists(), reason=f"{LORAX_PYTHON} is absent")),
]


@pytest.fixture(scope="module")
def ask(node):
    """What a client saw; each runs once, in a process of its own."""

    @functools.cache
    def run(client):
        python = str(LORAX_PYTHON) if client == "lorax" else sys.executable
        command = [python, str(SCRIPT), client, node.url, BASE, "lincoln", "reagan"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("client", CLIENTS)
def test_chat_is_the_same_whole_and_streamed(ask, client):
    seen = ask(client)
    assert seen["chat"]
    assert 1 < len(seen["stream"]) <= TOKENS
    assert "".join(seen["stream"]) == seen["chat"]


@pytest.mark.parametrize("client", CLIENTS)
def test_adapter_by_name_and_two_merged_answer_differently_from_the_base(ask, client):
    seen = ask(client)
    assert len({seen["chat"], seen["adapter"], seen["merged"]}) == 3


@pytest.mark.parametrize("client", CLIENTS)
def test_structured_output_follows_its_schema(ask, client):
    jsonschema.validate(ask(client)["structured"], SCHEMA)


@pytest.mark.parametrize("client", CLIENTS)
def test_tool_is_called_with_arguments_of_its_schema(ask, client):
    call = ask(client)["tool"]
    if client == "lorax":
        assert call is None, "lorax-client 0.6.3 has no tools"
        return
    assert call["name"] == "get_weather"
    assert list(call["arguments"]) == ["city"]


@pytest.mark.parametrize("client", CLIENTS)
def test_embedding_is_a_unit_vector(ask, client):
    vector = ask(client)["embedding"]
    assert len(vector) == 576
    assert sum(value * value for value in vector) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("client", CLIENTS)
def test_unknown_adapter_is_the_clients_own_exception_and_names_it(ask, client):
    error = ask(client)["unknown"]
    kind = {"openai": "NotFoundError", "langchain": "OpenAIModelNotFoundError", "lorax": "GenerationError"}[client]
    assert error.startswith(f"{kind}: ")
    assert "no-such-adapter" in error


def test_clients_of_one_protocol_see_the_same(ask):
    if importlib.util.find_spec("langchain_openai") is None:
        pytest.skip("langchain-openai is absent")
    sdk, chain = ask("openai"), ask("langchain")
    assert {name: sdk[name] for name in ("chat", "adapter", "merged", "structured", "tool")} == {
        name: chain[name] for name in ("chat", "adapter", "merged", "structured", "tool")
    }
