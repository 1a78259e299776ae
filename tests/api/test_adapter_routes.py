"""Loading and unloading while the node runs, in both spellings, over fakes."""

from __future__ import annotations

import pytest

from node.errors import OverloadedError


async def test_load_gives_the_name_and_brings_the_adapter_into_memory(bench, client):
    answer = await client.post("/v1/load_lora_adapter", json={"lora_name": "poet", "lora_path": "alice"})

    assert (answer.status, await answer.text()) == (200, "Success: LoRA adapter 'poet' added successfully.")
    assert bench.engine.wishes == [("prefetch", "1" * 64)]
    models = await (await client.get("/v1/models")).json()
    assert "poet" in [model["id"] for model in models["data"]]


async def test_load_passes_source_and_token_on(bench, client):
    body = {"lora_name": "poet", "lora_path": "org/bob", "adapter_source": "HUB", "api_token": "hf_x", "load_inplace": True}
    await client.post("/v1/load_lora_adapter", json=body)

    assert bench.catalog.asked == [("org/bob", "hub", "hf_x")]


async def test_load_in_place_lets_the_old_adapter_go(bench, client):
    await client.post("/v1/load_lora_adapter", json={"lora_name": "poet", "lora_path": "alice"})
    await client.post("/v1/load_lora_adapter", json={"lora_name": "poet", "lora_path": "org/bob", "load_inplace": True})

    assert bench.engine.wishes[1:] == [("evict", "1" * 64), ("prefetch", "2" * 64)]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"lora_name": "alice", "lora_path": "org/bob"}, 400, "adapter_exists"),
        ({"lora_name": "poet", "lora_path": "absent"}, 404, "adapter_not_found"),
        ({"lora_name": "tiny-base", "lora_path": "alice"}, 400, "invalid_request"),
        ({"lora_name": "poet"}, 400, "invalid_request"),
        ({"lora_path": "alice"}, 400, "invalid_request"),
        ({"lora_name": "poet", "lora_path": "alice", "is_3d_lora_weight": True}, 400, "param_not_supported"),
        ({"lora_name": "poet", "lora_path": "alice", "adapter_source": "ftp"}, 400, "invalid_request"),
    ],
)
async def test_load_what_cannot_be_loaded_is_refused_and_nothing_changes(bench, client, body, status, code):
    answer = await client.post("/v1/load_lora_adapter", json=body)

    assert (answer.status, (await answer.json())["error"]["code"]) == (status, code)
    assert bench.engine.wishes == []


async def test_unload_takes_the_name_back_and_frees_the_memory(bench, client):
    answer = await client.post("/v1/unload_lora_adapter", json={"lora_name": "alice", "lora_int_id": None})

    assert (answer.status, await answer.text()) == (200, "Success: LoRA adapter 'alice' removed successfully.")
    assert bench.engine.wishes == [("evict", "1" * 64)]
    again = await client.post("/v1/unload_lora_adapter", json={"lora_name": "alice"})
    assert (again.status, (await again.json())["error"]["code"]) == (404, "adapter_not_found")


async def test_sglang_spelling_answers_with_success_and_what_is_loaded(bench, client):
    loaded = await client.post("/load_lora_adapter", json={"lora_name": "poet", "lora_path": "alice", "pinned": False})
    unloaded = await client.post("/unload_lora_adapter", json={"lora_name": "poet"})

    assert (loaded.status, unloaded.status) == (200, 200)
    body = await loaded.json()
    assert (body["success"], body["error_message"], body["loaded_adapters"]["poet"]) == (True, None, "alice")
    assert "poet" not in (await unloaded.json())["loaded_adapters"]


@pytest.mark.parametrize(
    "body", [{"lora_name": "alice", "lora_path": "alice"}, {"lora_name": "x", "lora_path": "alice", "pinned": True}]
)
async def test_sglang_spelling_says_failure_in_the_body(client, body):
    answer = await client.post("/load_lora_adapter", json=body)
    found = await answer.json()

    assert (answer.status, found["success"]) == (400, False)
    assert found["error_message"]


async def test_models_say_price_and_where_each_adapter_is(bench, client):
    bench.engine.stats = type(bench.engine.stats)(resident_adapters=("1" * 64,))
    data = (await (await client.get("/v1/models")).json())["data"]

    states = {model["id"]: model["openlora"]["state"] for model in data}
    assert states == {"tiny-base": "resident", "alice": "resident", "org/bob": "disk"}
    assert set(data[1]["openlora"]["price"]) == {"input_token_wei", "output_token_wei"}
    assert data[1]["parent"] == "tiny-base"


async def test_unload_of_one_tenants_name_leaves_what_everybody_has_in_memory(make_bench, make_client):
    bench = make_bench(keys={"ann": "a-key-of-ann-1234567"})
    client, headers = await make_client(bench), {"Authorization": "Bearer a-key-of-ann-1234567"}
    await client.post("/v1/load_lora_adapter", json={"lora_name": "poet", "lora_path": "alice"}, headers=headers)

    answer = await client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"}, headers=headers)

    assert answer.status == 200
    assert [kind for kind, _ in bench.engine.wishes] == ["prefetch"]


async def test_load_in_place_of_one_tenants_name_leaves_what_everybody_has_in_memory(make_bench, make_client):
    bench = make_bench(keys={"ann": "a-key-of-ann-1234567"})
    client, headers = await make_client(bench), {"Authorization": "Bearer a-key-of-ann-1234567"}
    for target in ("alice", "org/bob", "alice"):
        body = {"lora_name": "poet", "lora_path": target, "load_inplace": True}
        await client.post("/v1/load_lora_adapter", json=body, headers=headers)

    assert [kind for kind, _ in bench.engine.wishes] == ["prefetch"] * 3


async def test_unload_of_a_name_that_was_not_found_again_since_a_restart_evicts_nothing(bench, client):
    async def unregister(name, *, owner, sees):
        return None, True

    bench.catalog.unregister = unregister
    answer = await client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})

    assert (answer.status, await answer.text()) == (200, "Success: LoRA adapter 'poet' removed successfully.")
    assert bench.engine.wishes == []


async def test_full_command_queue_neither_fails_a_load_nor_an_unload(bench, client):
    def refuse(*_):
        raise OverloadedError("the engine's command queue is full")

    bench.engine.prefetch = bench.engine.evict = refuse
    loaded = await client.post("/v1/load_lora_adapter", json={"lora_name": "poet", "lora_path": "alice"})
    unloaded = await client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})

    assert (loaded.status, unloaded.status) == (200, 200)
