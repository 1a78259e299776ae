"""`/v1/embeddings` and `/embed` over fakes: shapes, encodings, receipts, refusals."""

from __future__ import annotations

import base64
import struct

import pytest


@pytest.fixture
def embedding(bench):
    """The engine answers every sequence with the vector (3, 4)."""
    bench.engine.embedding = struct.pack("<2f", 3.0, 4.0)
    return bench


async def test_embeddings_are_unit_vectors_with_usage_and_receipt(embedding, client):
    answer = await client.post("/v1/embeddings", json={"model": "alice", "input": ["one", "two"]})
    body = await answer.json()

    assert answer.status == 200
    assert [item["index"] for item in body["data"]] == [0, 1]
    assert body["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    assert body["embeddings"] == body["data"]
    assert body["usage"]["prompt_tokens"] == sum(len(prompt) for prompt in embedding.books.opened[0].prompts)
    assert answer.headers["x-openlora-adapters"] == "1" * 64
    closing = embedding.one_closing()
    assert (closing.status, closing.outputs) == ("ok", ((), ()))
    assert all(submit.embeds and submit.sampling.max_new_tokens == 0 for submit in embedding.engine.submits)


async def test_embeddings_in_base64_hold_the_same_floats(embedding, client):
    body = {"model": "", "input": [5, 6], "encoding_format": "base64"}
    answer = await (await client.post("/v1/embeddings", json=body)).json()

    assert struct.unpack("<2f", base64.b64decode(answer["data"][0]["embedding"])) == pytest.approx((0.6, 0.8))


async def test_embed_answers_in_lorax_shape(embedding, client):
    body = {"inputs": "one", "parameters": {"adapter_id": "alice", "merged_adapters": None}, "stream": False}
    answer = await client.post("/embed", json=body)

    assert answer.status == 200
    assert (await answer.json())["embeddings"] == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"model": "alice+org/bob@0.7:0.3", "input": "one"}),
        ("/v1/embeddings", {"model": "", "input": "one", "adapters": [
            {"model": "alice", "weight": 0.7}, {"model": "org/bob", "weight": 0.3}
        ]}),
        ("/v1/embeddings", {"model": "tiny-base", "input": "one", "parameters": {"merged_adapters": {
            "ids": ["alice", "org/bob"], "weights": [0.7, 0.3]
        }}}),
        ("/embed", {"inputs": "one", "parameters": {"merged_adapters": {"ids": ["alice", "org/bob"], "weights": [0.7, 0.3]}}}),
    ],
)  # fmt: skip
async def test_embedding_of_several_adapters_names_and_weighs_them_all(embedding, client, path, body):
    answer = await client.post(path, json=body)

    assert answer.status == 200, await answer.text()
    assert answer.headers["x-openlora-adapters"] == ",".join(["1" * 64, "2" * 64])
    assert [(term.adapter_id, term.weight) for term in embedding.engine.submits[0].terms] == [("1" * 64, 0.7), ("2" * 64, 0.3)]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "a"}, "model"),
        ({"model": ""}, "input"),
        ({"model": "", "input": ""}, "input"),
        ({"model": "", "input": []}, "input"),
        ({"model": "", "input": ["a", 1]}, "input"),
        ({"model": "", "input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"model": "", "input": "a", "dimensions": 8}, "dimensions"),
        ({"model": "alice+org/bob@1:2:3", "input": "a"}, "model"),
        ({"model": "", "input": "a", "adapters": []}, "adapters"),
    ],
)
async def test_embeddings_of_a_bad_body_are_refused_by_name(client, body, param):
    answer = await client.post("/v1/embeddings", json=body)

    assert (answer.status, (await answer.json())["error"]["param"]) == (400, param)


async def test_embeddings_the_engine_does_not_give_are_an_error(client):
    answer = await client.post("/v1/embeddings", json={"model": "", "input": "a"})

    assert (answer.status, (await answer.json())["error"]["code"]) == (503, "engine_unavailable")


async def test_classify_is_refused_by_name(client):
    answer = await client.post("/classify", json={"inputs": "a"})

    assert answer.status == 501


async def test_adapter_of_loraxs_parameters_is_read_and_named_once(embedding, client):
    body = {"model": "", "input": "one", "parameters": {"adapter_id": "org/bob", "adapter_source": "hub", "api_token": "hf_x"}}
    answer = await client.post("/v1/embeddings", json=body)
    twice = await client.post("/v1/embeddings", json={**body, "lora_path": "alice"})

    assert (answer.status, embedding.catalog.asked) == (200, [("org/bob", "hub", "hf_x")])
    assert (twice.status, (await twice.json())["error"]["param"]) == (400, "parameters")
