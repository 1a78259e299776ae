"""Which model or adapters a request names."""

from __future__ import annotations

from node.adapters.locations import SOURCES
from node.api.fields import Fields

_MAX_NAME_CHARS = 1024
_MAX_TOKEN_CHARS = 4096


def read_model(fields: Fields) -> str:
    """`model` of the OpenAI shapes: required, "" is the base model as LoRAX has it."""
    model = fields.label("model", _MAX_NAME_CHARS)
    if model is None:
        raise fields.error("model", 'is required: the base model, an adapter, or "" for the base model')
    return model


def read_source(fields: Fields) -> tuple[str | None, str | None]:
    """(`adapter_source`, `api_token`). The token is the adapter source's own credential, never this node's key."""
    source = fields.label("adapter_source", 32)
    if source is not None and source.lower() not in SOURCES:
        raise fields.error("adapter_source", f"must be one of {', '.join(SOURCES)}")
    return source.lower() if source else None, fields.label("api_token", _MAX_TOKEN_CHARS)
