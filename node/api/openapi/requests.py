"""What clients send. Bounds come from the same `Limits` that refuse for them, so the description cannot drift from the door."""

from __future__ import annotations

from attribution.record import SIGN_METHODS
from node.adapters.locations import SOURCES
from node.api.generation import Limits
from node.api.merge_fields import MAX_WEIGHT, STRATEGIES
from node.api.openapi.forms import choice_fields, form_schemas, structured_fields, tool_fields
from node.api.openapi.shapes import Schema, boolean, integer, items, number, optional, optionals, record, reference, text

_MAX_TOKENS = (1 << 31) - 1
_MAX_SEED = (1 << 63) - 1
_NAME_CHARS = 1024
_SINGLE = (("adapter_id", "LoRAX"), ("lora_path", "SGLang"))


def request_schemas(limits: Limits) -> dict[str, Schema]:
    """`components.schemas` of every request body."""
    return {
        "ChatRequest": _chat(limits),
        "CompletionRequest": _completion(limits),
        "LoraxRequest": _lorax(limits),
        "TokenizeRequest": record(
            "A text to cut into tokens.",
            {
                "inputs": text("The text.", min_chars=1, max_chars=limits.max_text_chars),
                "add_special_tokens": optional(boolean("Also those the tokenizer puts around a text; default true.")),
            },
            required=("inputs",),
        ),
        "EmbeddingRequest": _embedding(limits),
        "LoraxEmbedRequest": _embed(limits),
        "LoadRequest": _load(),
        "UnloadRequest": record("Take a name back.", {"lora_name": _adapter_name("The name.")}, required=("lora_name",)),
        "MergedAdapters": _merge(limits),
        "AdapterTerm": record(
            "One adapter of a request.",
            {
                "model": text("Its name, location or content hash.", min_chars=1, max_chars=_NAME_CHARS),
                "adapter_id": text("The same as `model`; one of the two.", min_chars=1, max_chars=_NAME_CHARS),
                "weight": optional(_weight()),
            },
            is_open=False,
        )
        | {"oneOf": [{"required": ["model"]}, {"required": ["adapter_id"]}]},
        **form_schemas(limits),
    }


def _adapter_name(description: str) -> Schema:
    return text(description, min_chars=1, max_chars=_NAME_CHARS)


def _model() -> Schema:
    return text(
        'The base model ("" is also the base), an adapter\'s name, location or content hash, or a recipe "a+b@0.7:0.3".',
        max_chars=_NAME_CHARS,
    )


def _source_fields() -> dict[str, Schema]:
    return {
        "adapter_source": text(f"Where the adapter is looked for: {', '.join(SOURCES)} in any case.", max_chars=32),
        "api_token": text("The caller's own credential at that source; never this node's key.", max_chars=4096),
    }


def _sampling(limits: Limits) -> dict[str, Schema]:
    return optionals(
        {
            "temperature": number("0 is greedy; default 1.", 0, 2),
            "top_k": integer("-1 and 0 switch it off.", -1, _MAX_TOKENS),
            "top_p": number("Nucleus sampling.", 0, 1, above_minimum=True),
            "min_p": number("Tokens less likely than this share of the most likely one are left out.", 0, 1),
            "typical_p": number("Locally typical sampling.", 0, 1, above_minimum=True),
            "repetition_penalty": number("Over prompt and output.", 0, 10, above_minimum=True),
            "frequency_penalty": number("Over the output.", -2, 2),
            "presence_penalty": number("Over the output.", -2, 2),
            "seed": integer("The same seed draws the same tokens, whatever else runs.", -_MAX_SEED - 1, _MAX_SEED),
            "logit_bias": {
                "type": "object",
                "description": f"Token ids (0 to {limits.vocab_size - 1}) to what is added to their logits.",
                "maxProperties": limits.max_logit_bias,
                "propertyNames": {"pattern": "^[0-9]{1,10}$"},
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            },
            "ignore_eos": boolean("Go on after an end-of-sequence token."),
            "ignore_eos_token": boolean("The same in LoRAX's spelling."),
            "user": text("For the caller's own use.", max_chars=256),
        }
    )


def _stop(limits: Limits) -> Schema:
    one = text("", min_chars=1, max_chars=limits.max_stop_chars)
    del one["description"]
    many = {"type": "array", "items": one, "maxItems": limits.max_stop_sequences}
    return {"anyOf": [one, many, {"type": "null"}], "description": "Strings that end the answer; none is ever part of it."}


def _streaming() -> dict[str, Schema]:
    return optionals(
        {
            "stream": boolean("Send the answer as it grows, as server-sent events."),
            "stream_options": record(
                "Only with `stream`.", optionals({"include_usage": boolean("One more chunk with token counts.")})
            ),
        }
    )


def _choices(limits: Limits) -> dict[str, Schema]:
    return {"n": optional(integer("Answers to each prompt.", 1, limits.max_choices))}


def _chat(limits: Limits) -> Schema:
    return record(
        "OpenAI's chat completion request.",
        {
            "model": _model(),
            "messages": items("The conversation.", reference("ChatMessage"), min_items=1, max_items=limits.max_messages),
            "max_tokens": optional(integer("Tokens of the answer at most.", 1, _MAX_TOKENS)),
            "max_completion_tokens": optional(integer("The same, OpenAI's newer name.", 1, _MAX_TOKENS)),
            "logprobs": optional(boolean("Report log-probabilities.")),
            "top_logprobs": optional(integer("Alternatives for each token; needs `logprobs`.", 0, limits.max_logprobs)),
            "stop": _stop(limits),
            **_choices(limits),
            **_sampling(limits),
            **_streaming(),
            **optionals({**structured_fields(), **tool_fields(), **_source_fields()}),
            **_adapters(limits),
        },
        required=("model", "messages"),
    )


def _completion(limits: Limits) -> Schema:
    return record(
        "OpenAI's completion request.",
        {
            "model": _model(),
            "prompt": _prompts(limits),
            "echo": optional(boolean("The prompt before the answer; with `logprobs` its tokens are scored too.")),
            "max_tokens": optional(integer("Tokens of each answer at most; default 16. 0 only with `echo`.", 0, _MAX_TOKENS)),
            "best_of": optional(
                integer(
                    "Answers made for each prompt, of which the `n` likeliest are given; not streamed.", 1, limits.max_choices
                )
            ),
            "logprobs": optional(integer("Alternatives for each token.", 0, limits.max_logprobs)),
            "stop": _stop(limits),
            **_choices(limits),
            **_sampling(limits),
            **_streaming(),
            **optionals({**structured_fields(), **_source_fields()}),
            **_adapters(limits),
        },
        required=("model", "prompt"),
    )


def _weight() -> Schema:
    return {
        "description": "Multiplies the adapter's own scale; text keeps every digit.",
        "anyOf": [
            {"type": "number", "minimum": -MAX_WEIGHT, "maximum": MAX_WEIGHT},
            {"type": "string", "pattern": r"^-?[0-9]{1,2}(\.[0-9]{1,18})?$"},
        ],
    }


def _merge_options() -> dict[str, Schema]:
    return optionals(
        {
            "merge_strategy": text(
                "How several adapters are combined. linear (the default) is the exact sum of their changes; the others make one "
                "adapter of them as PEFT's add_weighted_adapter does: linear_factors is what PEFT calls linear.",
                choices=STRATEGIES,
            ),
            "density": number("Share of values that ties, dare_linear and dare_ties keep; those need it, above 0.", 0, 1),
            "majority_sign_method": text("Of ties and dare_ties; default total.", choices=SIGN_METHODS),
        }
    )


def _adapters(limits: Limits) -> dict[str, Schema]:
    listed = items("Adapters of the base model, instead of one in `model`.", reference("AdapterTerm"), min_items=1)
    return {
        "adapters": optional(listed | {"maxItems": limits.max_terms}),
        **optionals(
            {key: text(f"One adapter of the base model, as {server} says it.", max_chars=_NAME_CHARS) for key, server in _SINGLE}
        ),
        "merged_adapters": optional(reference("MergedAdapters")),
        **_merge_options(),
    }


def _prompts(limits: Limits) -> Schema:
    token = {"type": "integer", "minimum": 0, "maximum": limits.vocab_size - 1}
    prompt = {"type": "string", "minLength": 1}
    ids = {"type": "array", "items": token, "minItems": 1, "maxItems": limits.max_model_len - 1}
    return {
        "description": "A text, token ids, or several of one kind.",
        "anyOf": [
            prompt,
            ids,
            {"type": "array", "items": prompt, "minItems": 1, "maxItems": limits.max_prompts},
            {"type": "array", "items": ids, "minItems": 1, "maxItems": limits.max_prompts},
        ],
    }


def _embedding(limits: Limits) -> Schema:
    return record(
        "OpenAI's embedding request.",
        {
            "model": _model(),
            "input": _prompts(limits),
            **optionals(
                {
                    "encoding_format": choice_fields("How vectors are written; default float.", "float", "base64"),
                    "user": text("For the caller's own use.", max_chars=256),
                    **_source_fields(),
                }
            ),
            "parameters": optional(_lorax_adapters()),
            **_adapters(limits),
        },
        required=("model", "input"),
    )


def _lorax_adapters() -> Schema:
    return record(
        "LoRAX's spelling of the adapters. All optional.",
        {
            **optionals({"adapter_id": _adapter_name("An adapter."), **_source_fields()}),
            "merged_adapters": optional(reference("MergedAdapters")),
        },
    )


def _embed(limits: Limits) -> Schema:
    return record(
        "LoRAX's embedding request.",
        {
            "inputs": text("The text.", min_chars=1, max_chars=limits.max_text_chars),
            "parameters": optional(_lorax_adapters()),
        },
        required=("inputs",),
    )


def _load() -> Schema:
    return record(
        "Give an adapter a name of the caller's own, and bring it into memory. The name holds until it is unloaded, also over a "
        "restart of the node; `api_token` does not, and is asked for again.",
        {
            "lora_name": text("The new name.", min_chars=1, max_chars=96),
            "lora_path": _adapter_name(
                "What it stands for: a name, location or content hash, or an absolute path below one of the node's directories."
            ),
            **optionals({"load_inplace": boolean("Look it up anew and replace what the name stood for."), **_source_fields()}),
        },
        required=("lora_name", "lora_path"),
    )


def _merge(limits: Limits) -> Schema:
    name = {"type": "string", "minLength": 1, "maxLength": _NAME_CHARS}
    return record(
        "Several adapters in one answer, LoRAX's spelling.",
        {
            "ids": items("Names; none twice.", name, min_items=1, max_items=limits.max_terms) | {"uniqueItems": True},
            "weights": optional(items("One for each; left out: 1 each.", _weight())),
            **_merge_options(),
        },
        required=("ids",),
    )


def _lorax(limits: Limits) -> Schema:
    most = (1 << 32) - 1
    parameters = record(
        "All optional.",
        {
            **optionals(
                {
                    "adapter_id": text(
                        "An adapter's name, location or content hash; absent: the base model.", max_chars=_NAME_CHARS
                    ),
                    **_source_fields(),
                    "max_new_tokens": integer("Tokens of the answer at most.", 1, most),
                    "temperature": number("Above 0.", 0),
                    "top_k": integer("Draw among so many tokens.", 1, most),
                    "top_p": number("Nucleus sampling.", 0, 1, above_minimum=True),
                    "typical_p": number("Locally typical sampling.", 0, 1, above_minimum=True),
                    "repetition_penalty": number("Over prompt and output.", 0, above_minimum=True),
                    "frequency_penalty": number("Over the output.", -2, 2),
                    "presence_penalty": number("Over the output.", -2, 2),
                    "do_sample": boolean("Draw; greedy otherwise, unless another parameter asks for drawing."),
                    "ignore_eos_token": boolean("Go on after an end-of-sequence token."),
                    "return_full_text": boolean("The prompt before the answer."),
                    "truncate": integer("Keep only so many tokens of the prompt's end.", 1, limits.max_model_len),
                    "details": boolean("Tokens, counts and the finish reason."),
                    "decoder_input_details": boolean("Also the prompt's tokens; not while streaming."),
                    "return_k_alternatives": integer("Alternatives for each token.", 0, limits.max_logprobs),
                    "seed": integer("The same seed draws the same tokens.", -_MAX_SEED - 1, (1 << 64) - 1),
                    "best_of": integer(
                        "So many answers are made and paid for, the likeliest is given; drawn, without seed or stream.",
                        1,
                        limits.max_choices,
                    ),
                }
            ),
            "merged_adapters": optional(reference("MergedAdapters")),
            "response_format": optional(reference("ResponseFormat")),
            "stop": _stop(limits),
        },
    )
    return record(
        "LoRAX's generation request.",
        {
            "inputs": text("The prompt.", min_chars=1, max_chars=limits.max_text_chars),
            "parameters": optional(parameters),
            "stream": optional(boolean("Only on `/` and `/invocations`.")),
        },
        required=("inputs",),
    )
