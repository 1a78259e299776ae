"""The OpenAPI 3.1 document of the public listener: every route, what it takes, what it answers.

A test compares its paths with the router's, and schemathesis sends what it allows to a running node.
"""

from __future__ import annotations

from typing import Any

from node.api.generation import Limits
from node.api.openapi.answers import answer_schemas
from node.api.openapi.requests import request_schemas
from node.api.openapi.shapes import Schema, reference

_OPENAI_ERRORS = {
    "400": "A field is wrong.",
    "401": "No key, or a wrong one.",
    "402": "A voucher is missing or too small.",
    "403": "Refused to this caller, or a source this node does not follow.",
    "404": "No such model, adapter or receipt.",
    "405": "The route has another method.",
    "408": "The body took too long.",
    "409": "The adapter's bytes are not the pinned ones, or the Idempotency-Key stands for another request.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "422": "The files are no usable adapter of this base model.",
    "429": "A queue, a rate or a budget is full; Retry-After says when to come back.",
    "500": "The engine failed this request.",
    "501": "The route needs a model of another kind.",
    "503": "The engine, the ledger or the source cannot serve now.",
    "504": "The adapter's source is too slow.",
    "507": "The adapter cache is full.",
}
_LORAX_ERRORS = {**_OPENAI_ERRORS, "424": "The adapter cannot be used, or the engine failed this request."}
_EVENTS = (
    "Events; the data of each is one JSON object, or [DONE]. Tokens come as they are made. What ends an answer, with its receipt,"
    " comes when its record is durable: in OpenAI's shapes a chunk with a finish reason and no text, on LoRAX's routes the event "
    "of the last token."
)
_NO_KEY: list[dict[str, list[str]]] = []
_ONCE: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Sent again with the same body, the answer is that of the first run, and nothing is run or charged twice; "
    "`idempotency-replayed: true` says so. Not with a streamed answer.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}


def build_document(limits: Limits, version: str) -> dict[str, Any]:
    """The whole document, ready for JSON."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "openlora-node",
            "version": version,
            "summary": "Many LoRA adapters over one base model, with a signed receipt for every answer.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"key": []}],
        "paths": {**_openai_paths(), **_lorax_paths(), **_model_paths(), **_adapter_paths(), **_status_paths()},
        "components": {
            "schemas": {**request_schemas(limits), **answer_schemas()},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "An API key; not asked for where the node has none."}
            },
        },
    }


def _openai_paths() -> dict[str, Any]:
    return {
        "/v1/chat/completions": {
            "post": _generation("chat", "Answer a conversation", "ChatRequest", reference("ChatCompletion"), _OPENAI_ERRORS)
        },
        "/v1/embeddings": {
            "post": _posting(
                "embeddings",
                "Embeddings of texts",
                "EmbeddingRequest",
                {"application/json": reference("Embeddings")},
                _OPENAI_ERRORS,
            )
            | {"parameters": [_ONCE]}
        },
        "/v1/completions": {
            "post": _generation("completion", "Continue a text", "CompletionRequest", reference("Completion"), _OPENAI_ERRORS)
        },
    }


def _adapter_paths() -> dict[str, Any]:
    done: dict[str, Any] = {"text/plain": {"type": "string"}}
    spoken: dict[str, Any] = {"application/json": reference("Loaded")}
    refused = {"400": {"description": "It was not done.", "content": {"application/json": {"schema": reference("Loaded")}}}}
    return {
        "/v1/load_lora_adapter": {
            "post": _posting("load", "Give an adapter a name and load it", "LoadRequest", done, _OPENAI_ERRORS)
        },
        "/v1/unload_lora_adapter": {
            "post": _posting("unload", "Take a name back and free its memory", "UnloadRequest", done, _OPENAI_ERRORS)
        },
        "/load_lora_adapter": {
            "post": _posting("loadSglang", "The same, SGLang's words", "LoadRequest", spoken, _OPENAI_ERRORS, refused)
        },
        "/unload_lora_adapter": {
            "post": _posting("unloadSglang", "The same, SGLang's words", "UnloadRequest", spoken, _OPENAI_ERRORS, refused)
        },
    }


def _lorax_paths() -> dict[str, Any]:
    whole, listed = reference("LoraxAnswer"), {"type": "array", "items": reference("LoraxAnswer"), "minItems": 1, "maxItems": 1}
    health = _operation("health", "Whether a token can be made and recorded now", _answers("", None, ("503",)), security=_NO_KEY)
    return {
        "/": {
            "post": _generation("loraxCompatible", "Generate, as lorax-client does", "LoraxRequest", listed, _LORAX_ERRORS),
            "get": {**health, "operationId": "healthRoot"},
        },
        "/invocations": {"post": _generation("invocations", "The same, SageMaker's name", "LoraxRequest", listed, _LORAX_ERRORS)},
        "/generate": {"post": _generation("generate", "Generate", "LoraxRequest", whole, _LORAX_ERRORS, has_stream=False)},
        "/generate_stream": {"post": _generation("generateStream", "Generate, as events", "LoraxRequest", None, _LORAX_ERRORS)},
        "/tokenize": {
            "post": _posting(
                "tokenize", "Cut a text into tokens", "TokenizeRequest", {"application/json": reference("Tokens")}, _LORAX_ERRORS
            )
        },
        "/embed": {
            "post": _posting(
                "embed",
                "A text's embedding",
                "LoraxEmbedRequest",
                {"application/json": reference("LoraxEmbedding")},
                _LORAX_ERRORS,
            )
            | {"parameters": [_ONCE]}
        },
        "/classify": {"post": _refused("classify")},
        "/classify_batch": {"post": _refused("classifyBatch")},
    }


def _model_paths() -> dict[str, Any]:
    name = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {
        "/v1/models": {"get": _reading("models", "The base model and the adapters", reference("ModelList"))},
        "/v1/models/{id}": {
            "get": {**_reading("model", "One of them", reference("Model"), ("404",)), "parameters": [name]}
        },
        "/info": {"get": _reading("info", "The node and its model, LoRAX's fields", reference("Info"))},
        "/v1/receipts/{id}": {
            "get": {**_reading("receipt", "The signed receipt of a request of this caller", reference("Receipt"), ("404",)),
                    "parameters": [name]}
        },
    }  # fmt: skip


def _status_paths() -> dict[str, Any]:
    metrics = {"text/plain": {"schema": {"type": "string"}}, "application/json": {"schema": reference("Metrics")}}
    ready = _answers("Yes; the body is empty.", None, ("503",))
    return {
        "/health": {"get": _operation("healthCheck", "Whether a token can be made and recorded now", ready, security=_NO_KEY)},
        "/ping": {"get": _operation("ping", "The same, SageMaker's name", ready, security=_NO_KEY)},
        "/startup": {"get": _operation("startup", "The same, where LoRAX asks for a first token", ready, security=_NO_KEY)},
        "/metrics": {
            "get": _operation(
                "metrics",
                "Prometheus text; JSON with `?format=json`",
                {"200": {"description": "All metrics.", "content": metrics}, "401": _error("401", _OPENAI_ERRORS, "OpenAiError")},
            )
        },
    }


def _generation(
    name: str, summary: str, body: str, whole: Schema | None, errors: dict[str, str], *, has_stream: bool = True
) -> dict[str, Any]:
    content: dict[str, Any] = {} if whole is None else {"application/json": {"schema": whole}}
    if has_stream:
        content["text/event-stream"] = {"schema": {"description": _EVENTS}}
    shape = "LoraxError" if errors is _LORAX_ERRORS else "OpenAiError"
    responses = {"200": {"description": "The answer, with its receipt.", "content": content}}
    responses |= {status: _error(status, errors, shape) for status in errors if status != "501"}
    once = {"parameters": [_ONCE]} if whole is not None else {}
    return {**_operation(name, summary, responses), **once, "requestBody": _body(body)}


def _posting(
    name: str,
    summary: str,
    body: str,
    content: dict[str, Schema],
    errors: dict[str, str],
    refused: dict[str, Any] | None = None,
) -> dict[str, Any]:
    whole = {"description": "The answer.", "content": {kind: {"schema": found} for kind, found in content.items()}}
    shape = "LoraxError" if errors is _LORAX_ERRORS else "OpenAiError"
    responses = {
        "200": whole,
        **{status: _error(status, errors, shape) for status in errors if status != "501"},
        **(refused or {}),
    }
    return {**_operation(name, summary, responses), "requestBody": _body(body)}


def _refused(name: str) -> dict[str, Any]:
    """A route of LoRAX's for models of another kind."""
    responses = {status: _error(status, _LORAX_ERRORS, "LoraxError") for status in ("401", "429", "501")}
    return _operation(name, "Needs a model with a classification head; refused by name", responses)


def _reading(name: str, summary: str, schema: Schema, statuses: tuple[str, ...] = ()) -> dict[str, Any]:
    return _operation(name, summary, _answers("The answer.", schema, ("401", "429", *statuses)))


def _operation(
    name: str, summary: str, responses: dict[str, Any], security: list[dict[str, list[str]]] | None = None
) -> dict[str, Any]:
    found: dict[str, Any] = {"operationId": name, "summary": summary, "responses": responses}
    if security is not None:
        found["security"] = security
    return found


def _answers(description: str, schema: Schema | None, statuses: tuple[str, ...]) -> dict[str, Any]:
    whole: dict[str, Any] = {"description": description or "Yes; the body is empty."}
    if schema is not None:
        whole["content"] = {"application/json": {"schema": schema}}
    return {"200": whole, **{status: _error(status, _OPENAI_ERRORS, "OpenAiError") for status in statuses}}


def _error(status: str, meanings: dict[str, str], shape: str) -> dict[str, Any]:
    return {"description": meanings[status], "content": {"application/json": {"schema": reference(shape)}}}


def _body(name: str) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": reference(name)}}}
