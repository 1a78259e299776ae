"""Exercises a running node with the real lorax-client: python lorax_client.py BASE_URL [ADAPTER] [SECOND_ADAPTER] [API_KEY].

Prints one JSON object with what it saw and exits 0, or raises. Runs in an environment of its own: the client wants an older
huggingface-hub than the node.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import lorax
from lorax.errors import GenerationError, ValidationError
from lorax.types import MergedAdapters


def whole(client: lorax.Client) -> dict[str, Any]:
    """One answer with details, prefill and alternatives."""
    answer = client.generate("Once upon a time", max_new_tokens=8, decoder_input_details=True, return_k_alternatives=2)
    check(answer.details is not None and len(answer.details.tokens) == answer.details.generated_tokens, "tokens")
    check(len(answer.details.prefill) == answer.details.prompt_tokens, "prefill")
    plain = client.generate("Once upon a time", max_new_tokens=8, details=False)
    check(plain.generated_text == answer.generated_text, "details change the text")
    return {"text": answer.generated_text, "tokens": answer.details.generated_tokens, "finish": str(answer.details.finish_reason)}


def streamed(client: lorax.Client) -> dict[str, Any]:
    """One event a token, the whole text in the last."""
    events = list(client.generate_stream("Once upon a time", max_new_tokens=8))
    text = "".join(event.token.text for event in events if not event.token.special)
    check(events[-1].generated_text == text, f"{events[-1].generated_text!r} != {text!r}")
    check(all(event.generated_text is None for event in events[:-1]), "early text")
    return {"text": text, "events": len(events)}


def errors(client: lorax.Client) -> list[str]:
    """The client's own exception classes must come out, whole and streamed."""
    seen = []
    for kind, call in (
        (GenerationError, lambda: client.generate("x", adapter_id="no-such-adapter", adapter_source="local")),
        (GenerationError, lambda: list(client.generate_stream("x", adapter_id="no-such-adapter", adapter_source="local"))),
        (ValidationError, lambda: client.generate("x" * 100_000, max_new_tokens=4)),
        (ValidationError, lambda: list(client.generate_stream("x" * 100_000, max_new_tokens=4))),
    ):
        try:
            call()
        except kind as error:
            seen.append(f"{type(error).__name__}: {str(error)[:80]}")
        else:
            raise AssertionError(f"{kind.__name__} did not come")
    return seen


async def asynchronous(url: str, headers: dict[str, str]) -> str:
    """The asynchronous client, whole and streamed."""
    client = lorax.AsyncClient(url, headers=headers, timeout=2)
    answer = await client.generate("Once upon a time", max_new_tokens=8)
    text = ""
    async for event in client.generate_stream("Once upon a time", max_new_tokens=8):
        text = event.generated_text or text
    check(text == answer.generated_text, "asynchronous stream and whole differ")
    return text


def check(is_true: bool, what: object) -> None:
    """An assertion that survives `python -O`."""
    if not is_true:
        raise AssertionError(str(what))


def main() -> None:
    """Run everything; adapters and their linear merge where they are named."""
    url, adapter, second, key = [*sys.argv[1:5], None, None, None][:4]
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    client = lorax.Client(url, headers=headers, timeout=120)
    result: dict[str, Any] = {"whole": whole(client), "stream": streamed(client)}
    check(result["whole"]["text"] == result["stream"]["text"], "stream and whole differ")
    result["errors"] = errors(client)
    result["async"] = asyncio.run(asynchronous(url, headers))
    if adapter:
        result["adapter"] = client.generate("Once", adapter_id=adapter, adapter_source="local", max_new_tokens=8).generated_text
    if adapter and second:
        merge = MergedAdapters(ids=[adapter, second], weights=[0.5, 0.5], merge_strategy="linear", density=0.0)
        result["merged"] = client.generate("Once", merged_adapters=merge, adapter_source="local", max_new_tokens=8).generated_text
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
