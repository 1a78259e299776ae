"""A tenant's private hub adapter, fetched with its own token: nobody else can use, see or time it, before and after a restart."""

from __future__ import annotations

import json

import pytest

from tests.adapters.conftest import AdapterWriter
from tests.adapters.test_hub import Hub
from tests.e2e.corpus.conftest import SETTINGS, make_key, write_base

pytestmark = pytest.mark.e2e

SECRET, TOKEN = "team/secret", "hf_the_token_of_ann"
ALIAS = "mine"


class House:
    """A node with two tenants beside a hub with one private repository; `ask` sends one short completion."""

    def __init__(self, kit, root, hub):
        self.kit, self.data_dir, self.hub = kit, root / "data", hub
        self.hub.hides_private = True
        far = AdapterWriter(root / "far")
        self.hub.publish(SECRET, far.write("secret", far.tensors(seed=5)), token=TOKEN)
        AdapterWriter(root / "adapters").write("good")
        self.keys = {}
        for tenant, scopes in (("ann", ()), ("ben", ("metrics",))):
            options = [
                option for scope in ("inference", "adapters:read", "adapters:write", *scopes) for option in ("--scope", scope)
            ]
            self.keys[tenant] = {"authorization": f"Bearer {make_key(kit, self.data_dir, tenant, *options)}"}
        settings = SETTINGS | {"OPENLORA_ADAPTERS__NEGATIVE_CACHE_S": "60", "OPENLORA_ADAPTERS__CACHE_BYTES": "1GiB"}
        self.env = kit.environment(**settings, HF_ENDPOINT=self.hub.url, HF_HOME=str(root / "hf"))
        self.options = ["--model", str(write_base(root / "base")), "--adapters-dir", str(root / "adapters")]
        self.node = self.start()

    def start(self):
        return self.kit.start_node(self.data_dir, *self.options, env=self.env)

    def restart(self):
        assert self.node.stop() == 0
        self.node = self.start()

    def post(self, tenant, path, body):
        return self.node.post(path, body, **self.keys[tenant])

    def get(self, tenant, path):
        return self.node.get(path, **self.keys[tenant])

    def ask(self, tenant, model, **more):
        return self.post(
            tenant, "/v1/completions", {"model": model, "prompt": "hello", "max_tokens": 2, "temperature": 0, **more}
        )

    def hub_calls(self, work):
        """What `work` answers, and how often it made the node ask the hub about a repository."""
        before = len(self.hub.requests)
        return work(), sum("/team/" in path for _, path, _ in self.hub.requests[before:])

    def seen_by_ben(self):
        """Everything of the node that tells of adapters."""
        listed = self.post("ben", "/load_lora_adapter", {"lora_name": "nothing", "lora_path": "no-such-adapter"}).body
        return json.dumps([self.get("ben", "/v1/models").body, listed, self.get("ben", "/metrics").body])


@pytest.fixture(scope="module")
def hub():
    made = Hub()
    yield made
    made.server.shutdown()


@pytest.fixture(scope="module")
def house(kit, tmp_path_factory, hub):
    made = House(kit, tmp_path_factory.mktemp("house"), hub)
    try:
        yield made
        assert made.node.stop() == 0
    finally:
        if made.node.process.poll() is None:
            made.node.kill()


@pytest.fixture(scope="module")
def used(house):
    """Ann has loaded and used her adapter; her answer."""
    loaded = house.post(
        "ann", "/v1/load_lora_adapter", {"lora_name": ALIAS, "lora_path": SECRET, "adapter_source": "hub", "api_token": TOKEN}
    )
    assert loaded.status == 200, loaded.body
    answer = house.ask("ann", ALIAS)
    assert answer.status == 200, answer.body
    return answer


def check_closed(house, adapter_id):
    """Ben gets for Ann's adapter what he gets for names that nobody has, after the same questions to the hub."""
    for own in ({}, {"api_token": "hf_the_token_of_ben"}):
        answers = []
        for name in (SECRET, "team/nobody"):
            for _ in range(2):  # the second is answered from the table of failures
                answer, calls = house.hub_calls(lambda name=name, own=own: house.ask("ben", name, **own))
                error = {**answer.body["error"], "request_id": ""}
                answers.append((answer.status, json.dumps(error).replace(name, "NAME"), calls))
        assert answers[:2] == answers[2:]
        assert answers[0][0] == 404
    for name in (ALIAS, adapter_id, f"good+{ALIAS}"):
        assert house.ask("ben", name).body["error"]["code"] == "model_not_found"
    assert house.get("ben", f"/v1/models/{ALIAS}").status == 404
    seen = house.seen_by_ben()
    assert "good" in seen
    for word in (SECRET, adapter_id, f'"{ALIAS}"', TOKEN):
        assert word not in seen


def test_private_adapter_is_its_tenants_alone(house, used):
    adapter_id = used.headers["x-openlora-adapters"]
    check_closed(house, adapter_id)
    assert house.get("ben", f"/v1/receipts/{used.headers['x-openlora-receipt']}").status == 404
    assert ALIAS in json.dumps(house.get("ann", "/v1/models").body)
    assert house.ask("ann", SECRET, api_token=TOKEN).body["choices"] == used.body["choices"]


def test_right_is_asked_for_on_every_request(house, used):
    answer, calls = house.hub_calls(lambda: house.ask("ann", ALIAS))
    assert (answer.status, calls > 0) == (200, True)
    commit, _, files = house.hub.repositories[SECRET]
    house.hub.repositories[SECRET] = (commit, "hf_another", files)
    try:
        assert house.ask("ann", ALIAS).status == 404
    finally:
        house.hub.repositories[SECRET] = (commit, TOKEN, files)


def test_private_adapter_stays_its_tenants_alone_over_a_restart(house, used):
    house.restart()
    check_closed(house, used.headers["x-openlora-adapters"])

    forgotten = house.ask("ann", ALIAS)
    assert (forgotten.status, forgotten.body["error"]["code"]) == (403, "adapter_gated")
    again = house.ask("ann", ALIAS, api_token=TOKEN)
    assert (again.status, again.body.get("choices")) == (200, used.body["choices"])
    check_closed(house, used.headers["x-openlora-adapters"])

    files = [path for path in house.data_dir.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    assert not [path for path in files if path.stat().st_size < 64 << 20 and TOKEN.encode() in path.read_bytes()]
