"""Exercises a running node with the real `openai` SDK: python openai_client.py BASE_URL BASE_MODEL [ADAPTER] [API_KEY].

Prints one JSON object with what it saw and exits 0, or raises. Needs nothing but the SDK, so it runs in any environment.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import openai


def chat(client: openai.OpenAI, model: str) -> dict[str, Any]:
    """One chat completion, whole."""
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": "Say hello."}], max_tokens=16, temperature=0, seed=1
    )
    answer = raw.parse()
    check(answer.object == "chat.completion", answer.object)
    check(answer.usage is not None and answer.usage.total_tokens > 0, "usage")
    check(answer.choices[0].finish_reason in ("stop", "length"), answer.choices[0].finish_reason)
    proof = (answer.model_extra or {})["openlora"]
    check(proof["request_id"] == raw.headers["x-openlora-receipt"], "receipt id")
    return {"text": answer.choices[0].message.content, "receipt_id": proof["request_id"], "receipt": proof["receipt"]}


def chat_stream(client: openai.OpenAI, model: str) -> dict[str, Any]:
    """The same, streamed with usage: must give the same text."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Say hello."}],
        max_tokens=16,
        temperature=0,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, finish, chunks = "", None, list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    last = chunks[-1]
    check(last.usage is not None and last.usage.completion_tokens > 0, "usage chunk")
    return {"text": text, "finish_reason": finish, "receipt_id": (last.model_extra or {})["openlora"]["request_id"]}


def completions(client: openai.OpenAI, model: str) -> dict[str, Any]:
    """Two prompts with two choices each, log-probabilities, a stop string; then a stream."""
    answer = client.completions.create(
        model=model, prompt=["Once", "Twice"], n=2, max_tokens=4, logprobs=1, temperature=0.5, seed=7
    )
    check([choice.index for choice in answer.choices] == [0, 1, 2, 3], "indexes")
    check(answer.choices[0].logprobs is not None, "logprobs")
    stopped = client.completions.create(model=model, prompt="Once", max_tokens=16, temperature=0, stop=[" ", "o"])
    check(" " not in stopped.choices[0].text and "o" not in stopped.choices[0].text, stopped.choices[0].text)
    pieces = client.completions.create(model=model, prompt="Once", max_tokens=8, temperature=0, stream=True)
    streamed = "".join(piece.choices[0].text for piece in pieces)
    whole = client.completions.create(model=model, prompt="Once", max_tokens=8, temperature=0).choices[0].text
    check(streamed == whole, f"{streamed!r} != {whole!r}")
    return {"text": whole}


def errors(client: openai.OpenAI, model: str) -> dict[str, Any]:
    """The SDK's own exception classes must come out."""
    seen = {}
    for name, kind, arguments in (
        ("unknown model", openai.NotFoundError, {"model": "no-such-model", "max_tokens": 4}),
        ("bad parameter", openai.BadRequestError, {"model": model, "max_tokens": 4, "temperature": 9}),
        ("response format", openai.BadRequestError, {"model": model, "response_format": {"type": "xml"}}),
    ):
        try:
            client.chat.completions.create(messages=[{"role": "user", "content": "x"}], **arguments)
        except kind as error:
            seen[name] = [error.status_code, error.code, error.param]
        else:
            raise AssertionError(f"{name} was answered")
    return seen


def check(is_true: bool, what: object) -> None:
    """An assertion that survives `python -O`."""
    if not is_true:
        raise AssertionError(str(what))


def main() -> None:
    """Run everything against the base model, and chat against the adapter where one is named."""
    url, base, adapter, key = [*sys.argv[1:5], None, None][:4]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key or "unused", max_retries=0, timeout=120)
    models = [model.id for model in client.models.list()]
    check(base in models, models)
    check(client.models.retrieve(base).id == base, "retrieve")
    result: dict[str, Any] = {"models": models, "chat": chat(client, base), "stream": chat_stream(client, base)}
    check(result["chat"]["text"] == result["stream"]["text"], "stream and whole differ")
    result["completions"] = completions(client, base)
    result["errors"] = errors(client, base)
    if adapter:
        result["adapter"] = chat(client, adapter)
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
