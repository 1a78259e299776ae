"""Reading `POST /v1/embeddings` and LoRAX's `POST /embed`.

An embedding is the hidden state of the text's last token after the final norm, divided by its Euclidean length: what adapters
that turn a decoder into an embedding model are trained for (last-token pooling).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from node.api.completion_request import read_prompts
from node.api.fields import Fields
from node.api.generation import Generation, Limits, NamedTerm, Prompt
from node.api.lorax_request import read_lorax_adapters
from node.api.merge_fields import Merged, read_adapters
from node.api.model_fields import read_model, read_source
from node.errors import RequestError
from node.request import Sampling

ENCODINGS = ("float", "base64")


def read_embeddings(body: dict[str, Any], limits: Limits) -> tuple[Generation, str]:
    """Check every field of `/v1/embeddings`.

    Returns:
        The request, and "float" or "base64".

    Raises:
        RequestError: A field is missing, of the wrong type or out of its range. UnsupportedError: `dimensions`.
    """
    fields = Fields(body)
    model = read_model(fields)
    prompts = read_prompts(fields, limits, "input")
    encoding = fields.text("encoding_format", 16) or "float"
    if encoding not in ENCODINGS:
        raise fields.error("encoding_format", f"must be one of {', '.join(ENCODINGS)}")
    fields.refuse("dimensions", remedy="leave it out and cut the vectors yourself")
    merged = read_adapters(fields, model, limits)
    fields.label("user")
    generation = _generation(fields, model, merged or _alone(model), prompts)
    return replace(generation, lists_adapters=fields.raw("adapters") is not None, warnings=tuple(fields.unknown())), encoding


def read_embed(body: dict[str, Any], limits: Limits, bearer: str | None) -> Generation:
    """Check every field of LoRAX's `/embed`.

    Raises:
        RequestError: A field is missing, of the wrong type or out of its range.
    """
    outer = Fields(body)
    inputs = outer.text("inputs", limits.max_text_chars)
    if not inputs:
        raise RequestError("`inputs` cannot be empty", param="inputs")
    outer.ignore("stream")
    fields = outer.inner("parameters") or Fields({})
    model, merged = read_lorax_adapters(fields, limits)
    generation = _generation(fields, model, merged, (Prompt(text=inputs),))
    warnings = (*outer.unknown(), *fields.unknown())
    return replace(generation, adapter_token=generation.adapter_token or bearer, warnings=warnings)


def _alone(model: str) -> Merged:
    return ((NamedTerm(model),) if model else ()), None


def _generation(fields: Fields, model: str, merged: Merged, prompts: tuple[Prompt, ...]) -> Generation:
    source, token = read_source(fields)
    terms, merge = merged
    return Generation(
        shape="embedding",
        model=model,
        terms=terms,
        merge=merge,
        prompts=prompts,
        sampling=Sampling(max_new_tokens=0),
        max_new_tokens=0,
        adapter_source=source,
        adapter_token=token,
        embeds=True,
    )
