"""What this node answers."""

from __future__ import annotations

from node.api.openapi.shapes import NULL, Schema, boolean, integer, items, number, optional, record, reference, text

_ANY_LOGPROBS: Schema = {"anyOf": [{"type": "object"}, NULL], "description": "As OpenAI has them; null unless asked for."}
_FINISH = ("stop", "length", "tool_calls")


def answer_schemas() -> dict[str, Schema]:
    """`components.schemas` of every answer."""
    return {
        "OpenAiError": record(
            "Every refusal of /v1 and of the node's own routes.",
            {
                "error": record(
                    "What happened.",
                    {
                        "message": text("What, the value, the limit and the remedy."),
                        "type": text("OpenAI's error type."),
                        "param": optional(text("The field at fault.")),
                        "code": text("Stable; what programs match on."),
                        "request_id": text("Finds the request in the node's log."),
                    },
                    required=("message", "type", "param", "code"),
                )
            },
            required=("error",),
        ),
        "LoraxError": record(
            "Every refusal of LoRAX's routes.",
            {
                "error": text("What, the value, the limit and the remedy."),
                "error_type": text("LoRAX's error type."),
                "code": text("Stable; what programs match on."),
                "request_id": text("Finds the request in the node's log."),
            },
            required=("error", "error_type", "code"),
        ),
        "Proof": record(
            "What ties the answer to its record.",
            {
                "request_id": text("Also the receipt's id."),
                "receipt": {"type": "object", "description": "Signed receipt bundle."},
            },
            required=("request_id", "receipt"),
        ),
        "Usage": record(
            "Token counts.",
            {
                "prompt_tokens": integer("Each prompt once.", 0),
                "completion_tokens": integer("Over all choices.", 0),
                "total_tokens": integer("Their sum.", 0),
                "prompt_tokens_details": record("", {"cached_tokens": integer("Saved by the prefix cache.", 0)}),
            },
            required=("prompt_tokens", "completion_tokens", "total_tokens"),
        ),
        "ChatCompletion": _openai("chat.completion", _chat_choice()),
        "Completion": _openai("text_completion", _completion_choice()),
        "LoraxAnswer": _lorax(),
        "Embeddings": record(
            "One unit vector a text.",
            {
                "object": text("", choices=("list",)),
                "data": items("In the order of the texts.", {"type": "object"}, min_items=1),
                "embeddings": items("The same, under LoRAX's name.", {"type": "object"}, min_items=1),
                "model": text("The adapter's name or the base model's."),
                "usage": record("Token counts.", {"prompt_tokens": integer("", 0), "total_tokens": integer("", 0)}),
                "openlora": reference("Proof"),
            },
            required=("object", "data", "model", "usage", "openlora"),
        ),
        "LoraxEmbedding": record(
            "One unit vector.",
            {"embeddings": items("Its components.", {"type": "number"}, min_items=1), "openlora": reference("Proof")},
            required=("embeddings", "openlora"),
        ),
        "Loaded": record(
            "SGLang's answer to loading and unloading.",
            {
                "success": boolean("Whether it was done."),
                "error_message": optional(text("Why not.")),
                "loaded_adapters": {"type": "object", "description": "Names to content hashes, as the caller sees them."},
            },
            required=("success", "error_message", "loaded_adapters"),
        ),
        "Model": _model(),
        "ModelList": record(
            "Everything this caller may use.",
            {"object": text("", choices=("list",)), "data": items("Base first.", reference("Model"))},
            required=("object", "data"),
        ),
        "Tokens": items(
            "The text's tokens.",
            record(
                "One token.",
                {
                    "id": integer("Token id.", 0),
                    "text": text("Its characters."),
                    "start": integer("First character.", 0),
                    "stop": integer("One after its last character.", 0),
                },
                required=("id", "text", "start", "stop"),
            ),
        ),
        "Info": record("The node and its model.", {"model_id": text("The base model.")}, required=("model_id", "version")),
        "Receipt": {"type": "object", "description": "A signed receipt bundle; `attribution.receipt.verify` checks it offline."},
        "Metrics": {"type": "object", "description": "Metric families by name, LoRAX's JSON form."},
    }


def _openai(kind: str, choice: Schema) -> Schema:
    return record(
        f"An answer of kind {kind}.",
        {
            "id": text("Unique."),
            "object": text("", choices=(kind,)),
            "created": integer("UTC seconds.", 0),
            "model": text("The adapter's name or the base model's."),
            "choices": items("One for each prompt and choice.", choice, min_items=1),
            "usage": reference("Usage"),
            "openlora": reference("Proof"),
        },
        required=("id", "object", "created", "model", "choices", "usage", "openlora"),
    )


def _chat_choice() -> Schema:
    message = record(
        "The answer.",
        {"role": text("", choices=("assistant",)), "content": optional(text("Its text; null beside tool calls."))},
        required=("role", "content"),
    )
    return record(
        "One choice.",
        {
            "index": integer("From 0.", 0),
            "message": message,
            "logprobs": _ANY_LOGPROBS,
            "finish_reason": text("Why it ended.", choices=_FINISH),
        },
        required=("index", "message", "logprobs", "finish_reason"),
    )


def _completion_choice() -> Schema:
    return record(
        "One choice.",
        {
            "index": integer("From 0.", 0),
            "text": text("The answer."),
            "logprobs": _ANY_LOGPROBS,
            "finish_reason": text("Why it ended.", choices=_FINISH[:2]),
        },
        required=("index", "text", "logprobs", "finish_reason"),
    )


def _lorax() -> Schema:
    token = record(
        "One token.",
        {
            "id": integer("Token id.", 0),
            "text": text("Its text."),
            "logprob": number("Natural logarithm of its probability."),
            "special": boolean("Whether it is a control token."),
        },
        required=("id", "text", "logprob", "special"),
    )
    details = record(
        "Only with `details`.",
        {
            "finish_reason": text("Why it ended.", choices=("length", "eos_token", "stop_sequence")),
            "prompt_tokens": integer("", 0),
            "generated_tokens": integer("", 0),
            "skipped_tokens": integer("Always 0.", 0),
            "seed": optional(integer("Where tokens were drawn.")),
            "prefill": items("The prompt's tokens.", {"type": "object"}),
            "tokens": items("The answer's tokens.", token),
        },
        required=("finish_reason", "prompt_tokens", "generated_tokens", "prefill", "tokens"),
    )
    return record(
        "LoRAX's answer.",
        {"generated_text": text("The answer."), "details": details, "openlora": reference("Proof")},
        required=("generated_text", "openlora"),
    )


def _model() -> Schema:
    return record(
        "A model this node serves: the base, or an adapter of it.",
        {
            "id": text("What `model` takes."),
            "object": text("", choices=("model",)),
            "created": integer("UTC seconds.", 0),
            "owned_by": text("Who serves it."),
            "root": text("The same name."),
            "parent": optional(text("An adapter's base model.")),
            "max_model_len": integer("Tokens of prompt and answer together.", 1),
            "openlora": {"type": "object", "description": "Content hashes, rank, price, where it is now."},
        },
        required=("id", "object", "created", "owned_by", "parent"),
    )
