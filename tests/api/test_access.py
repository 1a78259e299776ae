"""API keys, health by proof, models, metrics, receipts, logs, and what the room must not import."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

import pytest

from node.engine.messages import Stats

KEY = "k-0123456789abcdef"
CHAT = {"model": "alice", "messages": [{"role": "user", "content": "top secret prompt"}], "max_tokens": 8}


@pytest.fixture
async def locked(make_bench, make_client):
    bench = make_bench(keys={"ann": KEY, "bob": "another-key-123456"})
    return bench, await make_client(bench)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Bearer wrong")],
        [("Authorization", f"Bearer {KEY[:-1]}")],
        [("Authorization", f"Bearer {KEY}x")],
        [("Authorization", f"Basic {KEY}")],
        [("Authorization", "Bearer k\u00e9y")],
        [("Authorization", "Bearer " + "x" * 2000)],
        [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")],
    ],
)
async def test_wrong_key_is_401_with_one_text(locked, headers):
    _, client = locked
    texts = set()
    for path in ("/v1/models", "/metrics", "/v1/receipts/x", "/nothing"):
        answer = await client.get(path, headers=headers)
        error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (401, "invalid_api_key")
        texts.add(error["message"])
    assert len(texts) == 1


async def test_lorax_route_with_wrong_key_has_its_own_shape(locked):
    _, client = locked
    answer = await client.post("/generate", json={"inputs": "x"})
    assert (answer.status, (await answer.json())["error_type"]) == (401, "authentication")


async def test_right_key_names_the_tenant_and_is_never_a_source_token(locked):
    bench, client = locked
    headers = {"Authorization": f"Bearer {KEY}"}
    assert (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).status == 200
    body = {"inputs": "x", "parameters": {"adapter_id": "alice"}}
    assert (await client.post("/generate", json=body, headers=headers)).status == 200
    assert {submit.tenant for submit in bench.engine.submits} == {"ann"}
    assert all(token is None for _, _, token in bench.catalog.asked)


async def test_health_and_ping_are_open(locked):
    _, client = locked
    assert (await client.get("/health")).status == 200
    assert (await client.get("/ping")).status == 200
    assert (await client.get("/startup")).status == 200


async def test_health_is_ready_only_after_the_engine_made_a_token(bench, client):
    bench.engine.answer_ids = []
    bench.engine.eos_id = 0
    bench.engine.fail_after = 0
    assert (await client.get("/health")).status == 503
    bench.engine.fail_after = None
    assert (await client.get("/health")).status == 200
    probes = len(bench.engine.submits)
    assert (await client.get("/health")).status == 200
    assert len(bench.engine.submits) == probes
    assert bench.books.opened == []


async def test_health_needs_a_new_proof_after_the_engine_died(bench, client):
    assert (await client.get("/health")).status == 200
    bench.engine.is_alive = False
    dead = await client.get("/health")
    assert (dead.status, (await dead.json())["error_type"]) == (503, "healthcheck")
    bench.engine.is_alive = True
    probes = len(bench.engine.submits)
    assert (await client.get("/health")).status == 200
    assert len(bench.engine.submits) == probes + 1


async def test_models_list_base_and_adapters_with_parent_and_hash(client):
    data = (await (await client.get("/v1/models")).json())["data"]
    assert [(item["id"], item["parent"]) for item in data] == [
        ("tiny-base", None),
        ("alice", "tiny-base"),
        ("org/bob", "tiny-base"),
    ]
    one = await (await client.get("/v1/models/org/bob")).json()
    assert one == data[2]
    assert one["openlora"]["adapter_id"] == "2" * 64


async def test_info_has_loraxs_fields(client):
    body = await (await client.get("/info")).json()
    assert {"model_id", "model_sha", "max_total_tokens", "max_stop_sequences", "version"} <= set(body)


async def test_receipt_is_found_by_the_headers_id(client):
    answer = await client.post("/v1/chat/completions", json=CHAT)
    found = await client.get(f"/v1/receipts/{answer.headers['x-openlora-receipt']}")
    assert await found.json() == (await answer.json())["openlora"]["receipt"]


async def test_receipt_of_another_api_key_is_404_like_one_that_never_was(locked):
    _, client = locked
    ann, bob = ({"Authorization": f"Bearer {key}"} for key in (KEY, "another-key-123456"))
    answer = await client.post("/v1/chat/completions", json=CHAT, headers=ann)
    path = f"/v1/receipts/{answer.headers['x-openlora-receipt']}"

    assert (await client.get(path, headers=ann)).status == 200
    refused, missing = await client.get(path, headers=bob), await client.get("/v1/receipts/missing", headers=bob)
    assert (refused.status, (await refused.json())["error"]["code"]) == (404, "receipt_not_found")
    assert missing.status == 404


async def test_metrics_speak_three_dialects(bench, client):
    bench.engine.stats = Stats(
        running=2, waiting=3, kv_blocks_used=1, kv_blocks_total=4, resident_adapters=("1" * 64,), adapter_slots=8
    )
    await client.post("/v1/chat/completions", json=CHAT)
    await client.post("/v1/chat/completions", json={})
    for path in ("/health", "/v1/models", "/nowhere"):
        await client.get(path)
    text = await (await client.get("/metrics")).text()
    lines = text.splitlines()
    assert "vllm:num_requests_running 2.0" in lines
    assert "vllm:num_requests_waiting 3.0" in lines
    assert "vllm:kv_cache_usage_perc 0.25" in lines
    info = [line for line in lines if line.startswith("vllm:lora_requests_info{")]
    assert len(info) == 1
    assert 'max_lora="8"' in info[0]
    assert 'running_lora_adapters="alice"' in info[0]
    assert "lorax_request_count 2.0" in lines
    for name in ("validation_duration", "inference_duration", "mean_time_per_token_duration", "max_new_tokens", "input_length"):
        assert f"lorax_request_{name}_count 1.0" in lines
    assert "lorax_request_success 1.0" in lines
    assert 'lorax_request_failure{err="validation"} 1.0' in lines
    assert 'openlora_requests_total{outcome="ok",route="/v1/chat/completions"} 1.0' in lines
    assert 'openlora_adapter_requests_total{adapter="alice"} 1.0' in lines
    assert 'openlora_adapter_resident{adapter="alice"} 1.0' in lines
    assert any(line.startswith("openlora_output_tokens_total ") for line in lines)


async def test_stream_that_fails_is_counted_as_failed_alone(bench, client):
    await (await client.post("/generate_stream", json={"inputs": ""})).text()
    bench.engine.fail_after = 1
    await (await client.post("/v1/chat/completions", json={**CHAT, "stream": True})).text()

    lines = (await (await client.get("/metrics")).text()).splitlines()
    assert "lorax_request_count 2.0" in lines
    assert "lorax_request_success 0.0" in lines
    assert 'lorax_request_failure{err="validation"} 1.0' in lines
    assert 'lorax_request_failure{err="generation"} 1.0' in lines


@pytest.mark.parametrize("how", [{"params": {"format": "json"}}, {"headers": {"Accept": "application/json"}}])
async def test_metrics_as_json_have_loraxs_shape(client, how):
    await client.post("/v1/chat/completions", json={})
    body = await (await client.get("/metrics", **how)).json()
    assert {"key": 'err="validation"', "value": 1.0} in body["lorax_request_failure"]["data"]
    assert body["openlora_requests"]["type"] == "counter"
    keys = [(name, sample["key"]) for name, family in body.items() for sample in family["data"]]
    assert len(keys) == len(set(keys))


async def test_log_names_the_request_and_never_its_text(bench, client):
    answer = await client.post("/v1/chat/completions", json=CHAT, headers={"x-openlora-voucher": "AAAA"})
    assert answer.status == 402
    await client.post("/v1/chat/completions", json=CHAT)
    lines = [json.loads(line) for line in bench.log.getvalue().splitlines()]
    assert [line["status"] for line in lines if line["event"] == "request"] == [402, 200]
    assert "top secret" not in bench.log.getvalue()
    assert "hello world" not in bench.log.getvalue()


def encoded(**changes):
    voucher = {
        "payer": "0x" + "a" * 40,
        "operator": "0x" + "b" * 40,
        "cumulative": "340282366920938463463374607431768211456",
        "deadline": 4102444800,
        "signature": "0x" + "1" * 130,
    }
    return base64.urlsafe_b64encode(json.dumps({**voucher, **changes}).encode()).decode().rstrip("=")


async def test_voucher_header_reaches_the_books_typed(bench, client):
    await client.post("/v1/chat/completions", json=CHAT, headers={"x-openlora-voucher": encoded()})
    assert bench.books.opened[0].voucher.cumulative_wei == 1 << 128


@pytest.mark.parametrize(
    "header",
    ["", "!!!", "AAAA", encoded(payer="0x1"), encoded(cumulative=-1), encoded(cumulative=1.5), encoded(cumulative=str(1 << 256)),
     encoded(deadline=True), encoded(signature="0x"), "A" * 5000],
)  # fmt: skip
async def test_malformed_voucher_is_402_before_anything_runs(bench, client, header):
    answer = await client.post("/v1/chat/completions", json=CHAT, headers={"x-openlora-voucher": header})
    error = (await answer.json())["error"]
    assert (answer.status, error["code"]) == (402, "voucher_invalid")
    assert bench.books.opened == []


def test_the_room_imports_neither_torch_nor_transformers():
    code = "import sys, node.api.application, node.api.listener, node.api.settlement_books\n"
    code += "print([name for name in ('torch', 'transformers', 'web3') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


FOREIGN = {"Host": "rebound.example:8080"}


async def test_without_keys_a_foreign_host_is_refused_and_nothing_runs(make_bench, make_client):
    bench = make_bench()
    client = await make_client(bench)
    answer = await client.post("/v1/chat/completions", json=CHAT, headers=FOREIGN)
    error = (await answer.json())["error"]
    assert (answer.status, error["code"]) == (400, "invalid_request")
    assert "'rebound.example:8080'" in error["message"]
    assert "127.0.0.1" in error["message"]
    assert (await client.get("/v1/models", headers=FOREIGN)).status == 400
    assert (await client.get("/health", headers=FOREIGN)).status == 200
    assert all(submit.sampling.max_new_tokens == 1 for submit in bench.engine.submits)  # the probe's own


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9", "LOCALHOST:80", "localhost", "[::1]", "[::1]:8080"])
async def test_without_keys_every_name_of_this_machine_is_served(make_bench, make_client, host):
    client = await make_client(make_bench())
    assert (await client.post("/v1/chat/completions", json=CHAT, headers={"Host": host})).status == 200


@pytest.mark.parametrize("host", ["[::2]:80", "127.0.0.1.rebound.example", "localhost.rebound.example:80", "", "[", "::1"])
async def test_without_keys_what_only_looks_like_this_machine_is_refused(make_bench, make_client, host):
    client = await make_client(make_bench())
    assert (await client.get("/v1/models", headers={"Host": host})).status == 400


async def test_with_keys_or_openly_any_host_is_served(locked, make_bench, make_client):
    _, client = locked
    headers = {"Authorization": f"Bearer {KEY}", **FOREIGN}
    assert (await client.get("/v1/models", headers=headers)).status == 200
    for settings in ({"insecure": True}, {"host": "0.0.0.0", "insecure": True}):
        client = await make_client(make_bench(**settings))
        assert (await client.get("/v1/models", headers=FOREIGN)).status == 200
