"""One tenant asks for more unknown adapters than fit, from a source that does not answer; another one's only adapter arrives."""

from __future__ import annotations

import concurrent.futures
import threading

import pytest

from node.config import AdapterSettings
from tests.adapters.conftest import AdapterWriter
from tests.adapters.test_stores import WebServer
from tests.e2e.corpus.conftest import SETTINGS, make_key, write_base

pytestmark = pytest.mark.e2e

CROWD = 72
LIMIT = AdapterSettings().fetch_queue_limit
DEFAULTS = ("FETCH_WORKERS", "FETCH_QUEUE_LIMIT", "FETCH_TIMEOUT_S")  # the settings under test, as they come


@pytest.fixture
def source(tmp_path):
    """A web server; `go_on` lets it answer for names that begin with `slow`."""
    web = WebServer()
    far = AdapterWriter(tmp_path / "far").write("far")
    for name in ("wanted", *(f"slow-{number}" for number in range(CROWD))):
        web.publish(f"team/{name}", far)
    web.go_on = threading.Event()

    def hold(handler, path, body):
        if path.startswith("/team/slow-"):
            web.go_on.wait(120)
        return False

    web.behave = hold
    yield web
    web.go_on.set()
    web.server.shutdown()


@pytest.fixture
def node(kit, tmp_path, source):
    """A started node that fetches from there, with the keys of two tenants."""
    AdapterWriter(tmp_path / "adapters").write("good")
    keys = {name: {"authorization": f"Bearer {make_key(kit, tmp_path / 'data', name)}"} for name in ("ann", "ben")}
    settings = {name: value for name, value in SETTINGS.items() if not name.endswith(DEFAULTS)}
    store = f'[{{"url": "http://{source.host}/team", "allow_private": true}}]'
    env = kit.environment(**settings | {"OPENLORA_ADAPTERS__STORES": store, "OPENLORA_ADAPTERS__CACHE_BYTES": "1GiB"})
    options = ["--model", str(write_base(tmp_path / "base")), "--adapters-dir", str(tmp_path / "adapters")]
    running = kit.start_node(tmp_path / "data", *options, env=env)
    running.keys = keys
    yield running
    running.kill()


def test_cold_adapter_arrives_while_another_tenant_has_filled_the_queue(node, source):
    def ask(tenant, name):
        model = f"http://{source.host}/team/{name}"
        body = {"model": model, "prompt": "hello", "max_tokens": 2, "temperature": 0}
        return node.post("/v1/completions", body, **node.keys[tenant])

    with concurrent.futures.ThreadPoolExecutor(CROWD) as pool:
        crowd = [pool.submit(ask, "ann", f"slow-{number}") for number in range(CROWD)]
        answers = concurrent.futures.as_completed(crowd)
        refused = [next(answers).result() for _ in range(CROWD - LIMIT)]  # the others are under way
        ben = ask("ben", "wanted")
        source.go_on.set()
        others = [answer.result() for answer in answers]

    assert ben.status == 200, ben.body
    assert {(answer.status, answer.body["error"]["code"]) for answer in refused} == {(429, "adapter_queue_full")}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert sum(answer.status == 429 for answer in others) <= 1  # the newest of the crowd gave way, where none had ended
    assert any(answer.status == 200 for answer in others)
