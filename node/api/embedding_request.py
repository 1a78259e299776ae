"""Reading `POST /v1/embeddings` and LoRAX's `POST /embed`.

An embedding is the hidden state of the text's last token after the final norm, divided by its Euclidean length: what adapters
that turn a decoder into an embedding model are trained for (last-token pooling).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from node.api.adapter_fields import Named, read_named
from node.api.completion_request import read_prompts
from node.api.fields import Fields
from node.api.generation import Generation, Limits, Prompt
from node.api.lorax_request import read_lorax_adapters
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
    named, where = read_named(fields, model, limits), fields
    parameters = fields.inner("parameters")
    if parameters is not None:  # LoRAX's spelling of the same
        where, named = parameters, _of_parameters(parameters, named, model, limits)
    fields.label("user")
    generation = _generation(where, model, named, prompts)
    unknown = (*fields.unknown(), *(parameters.unknown() if parameters is not None else ()))
    return replace(generation, warnings=unknown), encoding


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
    generation = _generation(fields, model, Named(*merged), (Prompt(text=inputs),))
    warnings = (*outer.unknown(), *fields.unknown())
    return replace(generation, adapter_token=generation.adapter_token or bearer, warnings=warnings)


def _of_parameters(parameters: Fields, outer: Named, model: str, limits: Limits) -> Named:
    name, (terms, merge) = read_lorax_adapters(parameters, limits)
    if not terms:
        return outer
    if outer.is_listed:
        raise RequestError("adapters are named in `parameters` and beside it; use one of them", param="parameters")
    return Named(terms, merge, is_listed=name != model)


def _generation(fields: Fields, model: str, named: Named, prompts: tuple[Prompt, ...]) -> Generation:
    source, token = read_source(fields)
    return Generation(
        shape="embedding",
        model=model,
        terms=named.terms,
        merge=named.merge,
        lists_adapters=named.is_listed,
        prompts=prompts,
        sampling=Sampling(max_new_tokens=0),
        max_new_tokens=0,
        adapter_source=source,
        adapter_token=token,
        embeds=True,
    )
