"""Asks a running node for JSON with the real lorax-client: python lorax_structured.py BASE_URL SCHEMA. Prints what came back."""

from __future__ import annotations

import json
import sys

import lorax


def main() -> None:
    """The same greedy request, whole and streamed."""
    url, schema = sys.argv[1], json.loads(sys.argv[2])
    client = lorax.Client(url, timeout=120)
    form = {"type": "json_object", "schema": schema}
    prompt = "Ada Lovelace as JSON: "
    answer = client.generate(prompt, max_new_tokens=200, response_format=form)
    last = list(client.generate_stream(prompt, max_new_tokens=200, response_format=form))[-1]
    print(  # noqa: T201
        json.dumps(
            {"whole": answer.generated_text, "stream": last.generated_text, "finish": str(answer.details.finish_reason.value)}
        )
    )


if __name__ == "__main__":
    main()
