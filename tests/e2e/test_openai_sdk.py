"""The real `openai` SDK, unmodified, against a real node with a real model."""

from __future__ import annotations

from typing import Any

import openai
import pytest

pytestmark = pytest.mark.e2e

BASE = "smollm2-135m-instruct"
ADAPTERS = ["lincoln", "reagan", "roosevelt"]
HELLO: list[Any] = [{"role": "user", "content": "Name one colour."}]


@pytest.fixture(scope="module")
def client(node):
    with openai.OpenAI(base_url=f"{node.url}/v1", api_key="unused", max_retries=0, timeout=120) as client:
        yield client


def greedy(client, model=BASE, **extra):
    return client.chat.completions.create(model=model, messages=HELLO, max_tokens=12, temperature=0, **extra)


def test_models_list_the_base_and_the_three_demo_adapters(client):
    cards = {model.id: model.model_extra for model in client.models.list()}
    assert list(cards) == [BASE, *ADAPTERS]
    assert cards[BASE]["parent"] is None
    assert [cards[name]["parent"] for name in ADAPTERS] == [BASE] * 3
    assert client.models.retrieve("lincoln").id == "lincoln"


def test_chat_answers_with_text_usage_and_a_receipt(client):
    raw = client.chat.completions.with_raw_response.create(model=BASE, messages=HELLO, max_tokens=12, temperature=0)
    answer = raw.parse()
    choice, usage = answer.choices[0], answer.usage
    assert (choice.message.role, choice.finish_reason in ("stop", "length")) == ("assistant", True)
    assert choice.message.content
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens
    assert 1 <= usage.completion_tokens <= 12
    record = answer.model_extra["openlora"]["receipt"]["record"]
    assert record["request_id"] == raw.headers["x-openlora-receipt"]
    assert (record["tokens"]["prompt"], record["tokens"]["output"]) == (usage.prompt_tokens, usage.completion_tokens)


def test_chat_stream_gives_the_same_text_then_usage_and_the_receipt(client):
    whole = greedy(client)
    chunks = list(greedy(client, stream=True, stream_options={"include_usage": True}))
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    assert len(chunks) > 3
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].model_extra["openlora"]["receipt"]["record"]["status"] == "ok"
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_adapters_answer_differently_from_the_base_and_from_each_other(client):
    prompt = "Fellow citizens, the state of our Union is"
    answers = {
        model: client.completions.create(model=model, prompt=prompt, max_tokens=16, temperature=0).choices[0].text
        for model in (BASE, *ADAPTERS)
    }
    assert len(set(answers.values())) == 4, answers


def test_chat_n_gives_separate_choices_and_counts_the_prompt_once(client):
    one = greedy(client)
    two = client.chat.completions.create(model=BASE, messages=HELLO, max_tokens=12, temperature=1.5, seed=3, n=2)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].message.content != two.choices[1].message.content
    assert two.usage.prompt_tokens == one.usage.prompt_tokens
    assert two.usage.completion_tokens > 2


def test_chat_logprobs_name_every_token_and_its_alternatives(client):
    answer = greedy(client, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        best = max(token.top_logprobs, key=lambda item: item.logprob)
        assert (best.token, best.logprob) == (token.token, token.logprob), "greedy takes the likeliest"


def test_chat_stop_ends_before_the_stop_string(client):
    text = greedy(client).choices[0].message.content
    stop = text[4:8]
    stopped = greedy(client, stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == text[: text.index(stop)]


def test_chat_seed_reproduces_and_another_seed_does_not(client):
    def draw(seed):
        answer = client.chat.completions.create(model="reagan", messages=HELLO, max_tokens=16, temperature=1.3, seed=seed)
        return answer.choices[0].message.content

    assert draw(11) == draw(11)
    assert draw(11) != draw(12)


def test_completions_take_text_lists_and_token_ids(client, node):
    prompt = "The capital of France is"
    ids = [token["id"] for token in node.post("/tokenize", {"inputs": prompt}).body]

    def complete(value):
        return client.completions.create(model=BASE, prompt=value, max_tokens=8, temperature=0)

    text = complete(prompt).choices[0].text
    assert text
    assert complete(ids).choices[0].text == text
    several = complete([prompt, "Once upon a time"])
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == text
    assert [choice.text for choice in complete([ids, ids]).choices] == [text, text]


def test_completions_stream_and_logprobs_agree_with_the_whole_answer(client):
    whole = client.completions.create(model="lincoln", prompt="Once", max_tokens=8, temperature=0, logprobs=2, echo=False)
    pieces = client.completions.create(model="lincoln", prompt="Once", max_tokens=8, temperature=0, stream=True)
    logprobs = whole.choices[0].logprobs
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == whole.usage.completion_tokens


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        pytest.param(openai.NotFoundError, {"model": "no-such-model"}, (404, "model_not_found", "model"), id="unknown-model"),
        pytest.param(openai.BadRequestError, {"temperature": -1}, (400, "invalid_request", "temperature"), id="temperature"),
        pytest.param(openai.BadRequestError, {"n": 1000}, (400, "invalid_request", "n"), id="n"),
        pytest.param(openai.BadRequestError, {"messages": []}, (400, "invalid_request", "messages"), id="no-messages"),
        pytest.param(
            openai.BadRequestError,
            {"response_format": {"type": "xml"}},
            (400, "invalid_request", "response_format.type"),
            id="format",
        ),
        pytest.param(openai.BadRequestError, {"max_tokens": 10**6}, (400, "context_length_exceeded", "messages"), id="too-long"),
    ],
)
def test_chat_errors_are_the_sdks_own_classes(client, kind, changes, expected):
    before = greedy(client).choices[0].message.content
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": BASE, "messages": HELLO, "max_tokens": 4, **changes})
    assert (caught.value.status_code, caught.value.code, caught.value.param) == expected
    assert greedy(client).choices[0].message.content == before, "the next good request is unchanged"
