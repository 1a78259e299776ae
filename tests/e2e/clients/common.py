"""One script for three clients: python common.py openai|langchain|lorax BASE_URL BASE_MODEL ADAPTER SECOND_ADAPTER [API_KEY].

The same eight things, each in the client's own way, over what it has for them; a thing it cannot ask for is null. Prints one JSON
object and exits 0. Imports only the client it was told to use, so it runs in any environment that has it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

PROMPT = "Fellow citizens, the state of our Union is"
SCHEMA = {
    "title": "Person",
    "description": "Somebody.",
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "born": {"type": "integer", "minimum": 1000, "maximum": 2100}},
    "required": ["name", "born"],
    "additionalProperties": False,
}
WEATHER = {
    "name": "get_weather",
    "description": "The weather now.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
ASK = "Ada Lovelace was born in 1815. Describe her in JSON."
TOKENS = 12


class OpenAiClient:
    """The `openai` SDK."""

    def __init__(self, url: str, base: str, key: str) -> None:
        import openai

        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)
        self._error = openai.NotFoundError
        self._base = base

    def _chat(self, text: str, model: str | None = None, **extra: Any) -> Any:
        messages: Any = [{"role": "user", "content": text}]
        arguments = {"model": model or self._base, "messages": messages, "max_tokens": TOKENS, "temperature": 0, **extra}
        return self._client.chat.completions.create(**arguments)

    def chat(self) -> str:
        return self._chat(PROMPT).choices[0].message.content

    def stream(self) -> list[str]:
        chunks = self._chat(PROMPT, stream=True)
        return [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]

    def adapter(self, name: str) -> str:
        return self._chat(PROMPT, name).choices[0].message.content

    def merged(self, first: str, second: str) -> str:
        return self._chat(PROMPT, f"{first}+{second}@0.5:0.5").choices[0].message.content

    def structured(self) -> Any:
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
        return json.loads(self._chat(ASK, response_format=form, max_tokens=200).choices[0].message.content)

    def tool(self) -> Any:
        tools = [{"type": "function", "function": WEATHER}]
        once = {"tool_choice": "required", "parallel_tool_calls": False}
        answer = self._chat("What is the weather in Paris?", tools=tools, max_tokens=200, **once)
        (call,) = answer.choices[0].message.tool_calls
        return {"name": call.function.name, "arguments": json.loads(call.function.arguments)}

    def embedding(self) -> list[float]:
        return self._client.embeddings.create(model=self._base, input=PROMPT).data[0].embedding

    def unknown(self, name: str) -> str:
        try:
            self._chat(PROMPT, name)
        except self._error as error:
            return f"{type(error).__name__}: {error}"
        raise AssertionError("it was answered")


class LangChainClient:
    """LangChain's chat model for OpenAI's API."""

    def __init__(self, url: str, base: str, key: str) -> None:
        import langchain_openai
        import openai

        self._url, self._base, self._key = f"{url}/v1", base, key
        self._models, self._error = langchain_openai, openai.NotFoundError

    def _model(self, model: str | None = None, max_tokens: int = TOKENS) -> Any:
        arguments: Any = {"base_url": self._url, "api_key": self._key, "max_retries": 0, "timeout": 120}
        return self._models.ChatOpenAI(model=model or self._base, temperature=0, max_tokens=max_tokens, **arguments)

    def chat(self) -> str:
        return self._model().invoke(PROMPT).content

    def stream(self) -> list[str]:
        return [chunk.content for chunk in self._model().stream(PROMPT) if chunk.content]

    def adapter(self, name: str) -> str:
        return self._model(name).invoke(PROMPT).content

    def merged(self, first: str, second: str) -> str:
        return self._model(f"{first}+{second}@0.5:0.5").invoke(PROMPT).content

    def structured(self) -> Any:
        return self._model(max_tokens=200).with_structured_output(SCHEMA, method="json_schema", strict=True).invoke(ASK)

    def tool(self) -> Any:
        tools = [{"type": "function", "function": WEATHER}]
        model = self._model(max_tokens=200).bind_tools(tools, tool_choice="required", parallel_tool_calls=False)
        (call,) = model.invoke("What is the weather in Paris?").tool_calls
        return {"name": call["name"], "arguments": call["args"]}

    def embedding(self) -> list[float]:
        arguments: Any = {"base_url": self._url, "api_key": self._key, "check_embedding_ctx_length": False}
        return self._models.OpenAIEmbeddings(model=self._base, **arguments).embed_query(PROMPT)

    def unknown(self, name: str) -> str:
        try:
            self._model(name).invoke(PROMPT)
        except self._error as error:
            return f"{type(error).__name__}: {error}"
        raise AssertionError("it was answered")


class LoraxClient:
    """lorax-client: texts instead of messages, and no tools."""

    def __init__(self, url: str, base: str, key: str) -> None:
        import lorax
        from lorax.types import MergedAdapters

        # Without API keys this header is an adapter source's token, so a dummy is not sent.
        headers = {"Authorization": f"Bearer {key}"} if key != "unused" else {}
        self._client = lorax.Client(url, headers=headers, timeout=120)
        self._error, self._merge = lorax.errors.GenerationError, MergedAdapters

    def _generate(self, text: str = PROMPT, **extra: Any) -> str:
        return self._client.generate(text, **{"max_new_tokens": TOKENS, **extra}).generated_text

    def chat(self) -> str:
        return self._generate()

    def stream(self) -> list[str]:
        events = self._client.generate_stream(PROMPT, max_new_tokens=TOKENS)
        return [event.token.text for event in events if not event.token.special]

    def adapter(self, name: str) -> str:
        return self._generate(adapter_id=name, adapter_source="local")

    def merged(self, first: str, second: str) -> str:
        merge = self._merge(ids=[first, second], weights=[0.5, 0.5], merge_strategy="linear", density=0.0)
        return self._generate(merged_adapters=merge, adapter_source="local")

    def structured(self) -> Any:
        return json.loads(self._generate(ASK, max_new_tokens=200, response_format={"type": "json_object", "schema": SCHEMA}))

    def tool(self) -> None:
        """The client has none."""

    def embedding(self) -> list[float]:
        return self._client.embed(PROMPT).embeddings

    def unknown(self, name: str) -> str:
        try:
            self._generate(adapter_id=name, adapter_source="local")
        except self._error as error:
            return f"{type(error).__name__}: {error}"
        raise AssertionError("it was answered")


def main() -> None:
    """Ask for all of it."""
    kinds: dict[str, Any] = {
        "openai": OpenAiClient,
        "langchain": LangChainClient,
        "lorax": LoraxClient,
    }
    kind, url, base, first, second, key = [*sys.argv[1:7], "unused"][:6]
    client = kinds[kind](url, base, key)
    seen = {
        "chat": client.chat(),
        "stream": client.stream(),
        "adapter": client.adapter(first),
        "merged": client.merged(first, second),
        "structured": client.structured(),
        "tool": client.tool(),
        "embedding": client.embedding(),
        "unknown": client.unknown("no-such-adapter"),
    }
    sys.stdout.write(json.dumps(seen))


if __name__ == "__main__":
    main()
