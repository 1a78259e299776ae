"""Names given and taken back on a running node, and where the memory of an adapter is meanwhile."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.e2e

PROMPT = "Fellow citizens, the state of our Union is"


def complete(node, model):
    return node.post("/v1/completions", {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0})


def state_of(node, name):
    return node.get(f"/v1/models/{name}").body["openlora"]["state"]


def test_loaded_name_serves_the_adapter_until_it_is_unloaded(node, kit):
    node.post("/v1/load_lora_adapter", {"lora_name": "poet", "lora_path": "lincoln"})
    kit.wait_for(lambda: state_of(node, "poet") == "resident", "the loaded adapter", 30)

    assert complete(node, "poet").body["choices"] == complete(node, "lincoln").body["choices"]

    node.post("/v1/unload_lora_adapter", {"lora_name": "poet"})
    kit.wait_for(lambda: state_of(node, "lincoln") == "disk", "the freed memory", 30)
    refused = complete(node, "poet")
    assert (refused.status, refused.body["error"]["code"]) == (404, "model_not_found")
    assert complete(node, "lincoln").status == 200


def test_name_reloaded_in_place_serves_the_new_adapter_while_the_old_ones_answer_ends(node):
    body = {"model": "poet", "prompt": PROMPT, "max_tokens": 120, "temperature": 0, "ignore_eos": True}
    names = {name: {**body, "model": name} for name in ("lincoln", "reagan")}
    expected = {name: node.post("/v1/completions", asked).body["choices"][0]["text"] for name, asked in names.items()}
    node.post("/v1/load_lora_adapter", {"lora_name": "poet", "lora_path": "lincoln"})

    with node.stream("/v1/completions", {**body, "stream": True}) as events:
        running = iter(events)
        text = next(running)["choices"][0]["text"]
        answer = node.post("/v1/load_lora_adapter", {"lora_name": "poet", "lora_path": "reagan", "load_inplace": True})
        after = node.post("/v1/completions", body)
        text += "".join(event["choices"][0]["text"] for event in running)

    assert answer.status == 200
    assert (text, after.body["choices"][0]["text"]) == (expected["lincoln"], expected["reagan"])
    assert node.post("/v1/unload_lora_adapter", {"lora_name": "poet"}).status == 200


def test_name_of_the_directory_comes_back_after_it_was_unloaded(node):
    assert node.post("/unload_lora_adapter", {"lora_name": "reagan"}).body["success"]
    assert complete(node, "reagan").status == 404
    for path in ("lincoln", "reagan"):
        assert node.post("/load_lora_adapter", {"lora_name": "reagan", "lora_path": path}).body["success"]
        assert complete(node, "reagan").status == 200
        unloaded = node.post("/unload_lora_adapter", {"lora_name": "reagan"}).body
        assert unloaded["success"]
        assert "reagan" not in unloaded["loaded_adapters"]
        assert complete(node, "reagan").body["error"]["code"] == "adapter_unloaded"
    assert node.post("/load_lora_adapter", {"lora_name": "reagan", "lora_path": "reagan"}).body["success"]
    assert complete(node, "reagan").status == 200


def test_names_and_added_adapters_outlive_a_restart(kit, tmp_path):
    data_dir, env = tmp_path / "data", kit.environment(OPENLORA_CHAIN__PROFILE="none")
    node = kit.start_node(data_dir, env=env)
    try:
        node.post("/v1/load_lora_adapter", {"lora_name": "poet", "lora_path": "lincoln"})
        node.post("/v1/unload_lora_adapter", {"lora_name": "reagan"})
        demo = kit.demo_adapters / "roosevelt"
        node.cli("adapters", "add", str(demo), "--name", "teddy")
        expected = complete(node, "lincoln").body["choices"]
        node.kill()
        node = kit.start_node(data_dir, env=env)

        assert complete(node, "poet").body["choices"] == expected
        assert complete(node, "reagan").status == 404
        assert complete(node, "teddy").status == 200
        listed = {model["id"] for model in node.get("/v1/models").body["data"]}
        assert {"poet", "teddy", "lincoln", "roosevelt"} <= listed
        assert "reagan" not in listed
        node.cli("adapters", "remove", "teddy")
        assert complete(node, "teddy").status == 404
    finally:
        node.kill()
