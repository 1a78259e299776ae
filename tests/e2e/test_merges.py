"""Merges over HTTP on a started node: derived once, answered by both APIs alike, every source recorded with its share."""

from __future__ import annotations

import pytest

from attribution import receipt

pytestmark = pytest.mark.e2e

PROMPT = "Fellow citizens, the state of our Union is"
IDS = ["lincoln", "reagan"]


def lorax(node, **merge):
    parameters = {"merged_adapters": {"ids": IDS, **merge}, "adapter_source": "local", "max_new_tokens": 8, "details": True}
    return node.post("/generate", {"inputs": PROMPT, "parameters": parameters})


@pytest.mark.parametrize(
    "merge",
    [
        {"merge_strategy": "ties", "density": 0.5, "majority_sign_method": "frequency"},
        {"merge_strategy": "dare_linear", "density": 0.7},
        {"merge_strategy": "dare_ties", "density": 0.7},
        {"merge_strategy": "linear_factors"},
    ],
    ids=lambda merge: merge["merge_strategy"],
)
def test_merge_answers_alike_over_both_apis_and_records_its_sources(node, merge):
    first = lorax(node, weights=[0.75, 0.25], **merge)
    again = lorax(node, weights=[0.75, 0.25], **merge)
    body = {"model": "lincoln+reagan@0.75:0.25", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **merge}
    openai = node.post("/v1/completions", body)

    assert (first.status, again.status, openai.status) == (200, 200, 200)
    assert first.body["generated_text"] == again.body["generated_text"] == openai.body["choices"][0]["text"]
    recipe = first.bundle["record"]["recipe"]
    assert recipe == openai.bundle["record"]["recipe"]
    assert (recipe["kind"], recipe["merge"]["strategy"]) == ("merge", merge["merge_strategy"])
    assert [(item["weight"], item["share_ppm"]) for item in recipe["adapters"]] == [("0.75", 750_000), ("0.25", 250_000)]
    assert first.headers["x-openlora-recipe"] == recipe["recipe_hash"]
    receipt.verify(first.bundle, [node.operator])


def test_sum_of_adapters_over_the_openai_api(node):
    listed = [{"model": "lincoln", "weight": 0.75}, {"model": "reagan", "weight": "0.25"}]
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}

    by_list = node.post("/v1/completions", {**body, "model": "", "adapters": listed})
    by_name = node.post("/v1/completions", {**body, "model": "lincoln+reagan@0.75:0.25"})

    assert by_list.body["choices"][0]["text"] == by_name.body["choices"][0]["text"]
    assert by_list.bundle["record"]["recipe"]["kind"] == "linear"
    assert by_list.bundle["record"]["recipe"] == by_name.bundle["record"]["recipe"]


def test_merge_without_density_is_refused_before_anything_is_made(node):
    answer = lorax(node, merge_strategy="ties")

    assert (answer.status, answer.body["error_type"]) == (422, "validation")
    assert "density" in answer.body["error"]
