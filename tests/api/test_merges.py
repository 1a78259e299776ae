"""Several adapters in one request, over both APIs, as the engine and the books see them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from attribution.record import Merge
from node.api.merge_fields import parse_recipe_name, read_weight
from node.errors import AdapterInvalidError, RequestError

ALICE, BOB, DERIVED = "1" * 64, "2" * 64, "d" * 64
CHAT = [{"role": "user", "content": "hello"}]


class FakeMerger:
    def __init__(self):
        self.recipes = []
        self.fault = None

    async def derive(self, recipe):
        self.recipes.append(recipe)
        if self.fault is not None:
            raise self.fault
        return SimpleNamespace(adapter_id=DERIVED, directory=Path("/derived"))


@pytest.fixture
def merger():
    return FakeMerger()


@pytest.fixture
def bench(make_bench, merger):
    bench = make_bench()
    return type(bench)(**{**vars(bench), "services": _with(bench.services, merger=merger)})


def _with(services, **changes):
    fields = {name: getattr(services, name) for name in services.__dataclass_fields__}
    return type(services)(**{**fields, **changes})


def terms(bench):
    return [(term.adapter_id, term.weight) for term in bench.engine.submits[-1].terms]


@pytest.mark.parametrize(
    "body",
    [
        {"model": "alice+org/bob@0.7:0.3"},
        {"model": "", "adapters": [{"model": "alice", "weight": 0.7}, {"adapter_id": "org/bob", "weight": "0.3"}]},
        {"model": "tiny-base", "adapters": [{"model": "alice", "weight": 0.7}, {"model": "org/bob", "weight": 0.3}]},
        {
            "model": "",
            "merged_adapters": {"ids": ["alice", "org/bob"], "weights": [0.7, 0.3], "merge_strategy": None, "density": 0},
        },
        {"model": "tiny-base:alice+org/bob@0.7:0.3"},
    ],
)
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
async def test_openai_sum_becomes_weighted_terms(bench, client, body, route):
    prompt = {"messages": CHAT} if "chat" in route else {"prompt": "hello"}

    answer = await client.post(route, json={**body, **prompt})

    assert answer.status == 200, await answer.text()
    assert terms(bench) == [(ALICE, 0.7), (BOB, 0.3)]
    assert [item.weight for item in bench.books.opened[0].recipe] == ["0.7", "0.3"]
    assert bench.books.opened[0].merge is None
    assert len(answer.headers["x-openlora-recipe"]) == 64
    assert (await answer.json())["model"] == (body["model"] or "tiny-base")


@pytest.mark.parametrize(
    "body",
    [
        {"model": "tiny-base", "adapter_id": "alice"},
        {"model": "", "lora_path": "alice", "adapter_id": None},
        {"model": "alice", "adapter_id": "alice"},
        {"model": "tiny-base:alice"},
    ],
)
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
async def test_adapter_in_another_servers_field_is_not_passed_over(bench, client, body, route):
    prompt = {"messages": CHAT} if "chat" in route else {"prompt": "hello"}

    answer = await client.post(route, json={**body, **prompt})

    assert (answer.status, terms(bench)) == (200, [(ALICE, 1.0)])
    assert "x-openlora-warnings" not in answer.headers


@pytest.mark.parametrize("name", ["tiny-base", "__base_model__", ""])
async def test_adapter_field_that_names_the_base_model_is_the_base_model(bench, client, name):
    answer = await client.post("/v1/completions", json={"model": "tiny-base", "adapter_id": name, "prompt": "hello"})

    assert (answer.status, terms(bench)) == (200, [])


async def test_openai_model_without_weights_adds_each_once(bench, client):
    await client.post("/v1/completions", json={"model": "alice+org/bob", "prompt": "hello"})

    assert terms(bench) == [(ALICE, 1.0), (BOB, 1.0)]


@pytest.mark.parametrize(
    ("asked", "merge"),
    [
        ({"merge_strategy": "ties", "density": 0.5}, Merge("ties", "0.5", "total")),
        ({"merge_strategy": "TIES", "density": 1, "majority_sign_method": "frequency"}, Merge("ties", "1", "frequency")),
        ({"merge_strategy": "dare_linear", "density": 0.25, "majority_sign_method": "total"}, Merge("dare_linear", "0.25")),
        ({"merge_strategy": "dare_ties", "density": 0.125}, Merge("dare_ties", "0.125", "total")),
        ({"merge_strategy": "linear_factors", "density": 0.5}, Merge("linear_factors")),
    ],
)
async def test_every_strategy_is_derived_and_every_source_recorded(bench, client, merger, asked, merge):
    merged = {"ids": ["alice", "org/bob"], "weights": [0.7, -0.3], **asked}

    lorax = await client.post("/generate", json={"inputs": "hello", "parameters": {"merged_adapters": merged}})
    chat = {
        "model": "tiny-base",
        "messages": CHAT,
        "adapters": [{"model": "alice", "weight": 0.7}, {"model": "org/bob", "weight": -0.3}],
    }
    openai = await client.post("/v1/chat/completions", json={**chat, **asked})

    assert (lorax.status, openai.status) == (200, 200)
    assert terms(bench) == [(DERIVED, 1.0)]
    first, second = merger.recipes
    assert first == second
    assert first.merge == merge
    assert [(source.adapter_id, source.weight) for source in first.sources] == [(ALICE, "0.7"), (BOB, "-0.3")]
    for opened in bench.books.opened:
        assert opened.merge == merge
        assert [(item.entry.adapter_id, item.weight) for item in opened.recipe] == [(ALICE, "0.7"), (BOB, "-0.3")]
    assert lorax.headers["x-openlora-recipe"] == openai.headers["x-openlora-recipe"] == first.recipe_hash()
    assert lorax.headers["x-openlora-adapters"] == f"{ALICE},{BOB}"


async def test_one_adapter_is_never_merged(bench, client, merger):
    merged = {"ids": ["alice"], "weights": [0.5], "merge_strategy": "ties", "density": 0.5}

    answer = await client.post("/generate", json={"inputs": "hello", "parameters": {"merged_adapters": merged}})

    assert answer.status == 200
    assert merger.recipes == []
    assert terms(bench) == [(ALICE, 0.5)]


async def test_adapters_that_cannot_be_merged_are_refused_before_admission(bench, client, merger):
    merger.fault = AdapterInvalidError("only a linear merge can hold those", code="adapter_feature_unsupported")
    body = {"model": "alice+org/bob", "prompt": "hello", "merge_strategy": "linear_factors"}

    answer = await client.post("/v1/completions", json=body)

    assert (await answer.json())["error"]["code"] == "adapter_feature_unsupported"
    assert bench.books.opened == []


BAD = {
    "both": ({"model": "alice+org/bob", "adapters": [{"model": "alice"}]}, "use one of them"),
    "other model": ({"model": "alice", "adapters": [{"model": "org/bob"}]}, "change the base model"),
    "empty": ({"model": "", "adapters": []}, "at least one"),
    "no name": ({"model": "", "adapters": [{"weight": 1}]}, "adapters[0].model"),
    "two names": ({"model": "", "adapters": [{"model": "a", "adapter_id": "b"}]}, "adapters[0].model"),
    "not an object": ({"model": "", "adapters": ["alice"]}, "adapters[0]"),
    "unknown field": ({"model": "", "adapters": [{"model": "alice", "scale": 1}]}, "adapters[0].scale"),
    "twice": ({"model": "alice+alice"}, "twice"),
    "the base among them": ({"model": "tiny-base+alice@1:1"}, "'tiny-base' is the base model"),
    "the base listed": ({"model": "", "adapters": [{"model": "alice"}, {"model": "tiny-base"}]}, "name the adapters alone"),
    "all zero": ({"model": "alice+org/bob@0:0"}, "every weight"),
    "count": ({"model": "alice+org/bob@1:2:3"}, "2 names and 3 weights"),
    "empty name": ({"model": "alice+@1:2"}, "names joined by +"),
    "a weight too few": ({"model": "org/bob+alice@0.7"}, "2 names and 1 weight;"),
    "weight": ({"model": "alice+org/bob@1:x"}, "must be a number"),
    "exponent": ({"model": "alice+org/bob@1e-9:1"}, "must be a number in plain decimals"),
    "weight range": ({"model": "alice+org/bob@1:101"}, "at most 100"),
    "many": ({"model": "a+b+c+d+e"}, "the limit is 4"),
    "strategy alone": ({"model": "alice", "merge_strategy": "ties"}, "needs `adapters`"),
    "density alone": ({"model": "alice", "density": 0.5}, "needs `adapters`"),
    "strategy": ({"model": "alice+org/bob", "merge_strategy": "svd"}, "linear_factors, ties, dare_linear or dare_ties"),
    "no density": ({"model": "alice+org/bob", "merge_strategy": "dare_ties"}, "above 0 and at most 1"),
    "density zero": ({"model": "alice+org/bob", "merge_strategy": "ties", "density": 0}, "above 0 and at most 1"),
    "density two": ({"model": "alice+org/bob", "merge_strategy": "ties", "density": 2}, "at most 1"),
    "method": (
        {"model": "alice+org/bob", "merge_strategy": "ties", "density": 0.5, "majority_sign_method": "x"},
        "total or frequency",
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_recipe_is_refused_by_name(bench, client, name):
    body, text = BAD[name]

    answer = await client.post("/v1/completions", json={**body, "prompt": "hello"})

    error = (await answer.json())["error"]
    assert answer.status == 400
    assert text in error["message"]
    assert bench.books.opened == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.1, "0.1"),
        ("0.1000", "0.1"),
        ("0.123456789012345678", "0.123456789012345678"),
        (1, "1"),
        (1e-5, "0.00001"),
        (-0.0, "0"),
        ("-0", "0"),
        ("007", "7"),
        (100, "100"),
    ],
)
def test_read_weight_is_the_decimal_of_the_text(value, expected):
    assert read_weight(value, "weight") == expected


@pytest.mark.parametrize(
    "value", [True, None, [], "", "1e2", " 1", "0x1", "nan", float("nan"), float("inf"), "0.1234567890123456789", 1e300]
)
def test_read_weight_of_anything_else_is_refused(value):
    with pytest.raises(RequestError):
        read_weight(value, "weight")


def test_recipe_name_of_revisions_and_locations():
    name = parse_recipe_name("org/a@v1.2+org/b@main@0.5:-2", 8)

    assert [(term.name, term.weight) for term in name] == [("org/a@v1.2", "0.5"), ("org/b@main", "-2")]
    assert [term.name for term in parse_recipe_name("org/a+org/b@main", 8)] == ["org/a", "org/b@main"]
    assert parse_recipe_name("s3://bucket/with+plus", 8) is None
    assert parse_recipe_name("org/a@main", 8) is None
    assert [term.name for term in parse_recipe_name("org/a+org/b@1.0", 8)] == ["org/a", "org/b@1.0"]
