"""Reading what form an answer must have: OpenAI's and LoRAX's `response_format`, vLLM's `guided_*` and `structured_outputs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from node.api import grammar_text
from node.api.body import parse_object
from node.api.fields import Fields, shown
from node.api.schema_limits import MAX_SCHEMA_BYTES, check_pattern, check_schema
from node.errors import GrammarError, RequestError

_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_MAX_CHOICES = 500
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


@dataclass(frozen=True, slots=True)
class Constraint:
    """A form for the answer. `grammar` is llguidance's notation, `param` the field that asked for it, for messages.

    Attributes:
        schema: Where the form is a JSON schema, that schema; it can then be one alternative beside tool calls.
    """

    grammar: str
    param: str
    schema: dict[str, Any] | None = None


def read_constraint(fields: Fields) -> Constraint | None:
    """The one form that a request asks for, or None.

    Raises:
        RequestError: Malformed, or two forms at once. GrammarError: A schema, pattern or grammar beyond the limits.
    """
    found = [item for item in (_read_response_format(fields), *_read_guided(fields)) if item is not None]
    if len(found) > 1:
        names = ", ".join(f"`{item.param}`" for item in found)
        raise RequestError(f"only one form can be asked of an answer. Given: {names}", param=found[1].param)
    if found and (fields.boolean("ignore_eos") or fields.boolean("ignore_eos_token")):
        raise RequestError(
            f"`{found[0].param}` says where the answer ends, so the end of sequence cannot be ignored with it",
            param=found[0].param,
        )
    return found[0] if found else None


def _read_response_format(fields: Fields) -> Constraint | None:
    inner = fields.inner("response_format")
    if inner is None:
        return None
    name = fields.name("response_format")
    kind = inner.text("type", 64)
    if kind == "text":
        return None
    if kind == "json_object":
        return _of_schema(inner.raw("schema"), f"{name}.schema")
    if kind == "json_schema":
        return _read_json_schema(inner, name)
    if kind == "regex":
        return _of_kind("regex", inner.raw("pattern") or inner.raw("regex"), f"{name}.pattern")
    raise inner.error("type", 'must be "text", "json_object", "json_schema" or "regex"')


def _read_json_schema(inner: Fields, name: str) -> Constraint:
    """OpenAI's `{"json_schema": {"name", "schema", "strict"}}`; LoRAX has the schema beside the type."""
    wrapped = inner.inner("json_schema")
    if wrapped is None:
        return _of_schema(inner.raw("schema"), f"{name}.schema")
    wrapped.label("name", 64)
    wrapped.text("description", 4096)
    wrapped.boolean("strict")  # a schema is always followed to the letter
    return _of_schema(wrapped.raw("schema"), f"{name}.json_schema.schema")


def _of_schema(schema: Any, param: str) -> Constraint:
    """Without a schema any JSON object will do, as LoRAX has it."""
    checked = _ANY_OBJECT if schema is None else check_schema(schema, param)
    return Constraint(grammar_text.of_schema(checked), param, checked)


def _read_guided(fields: Fields) -> list[Constraint | None]:
    outputs = fields.inner("structured_outputs")
    found = [_of_kind(kind, fields.raw(key), fields.name(key)) for key, kind in _GUIDED.items()]
    if outputs is not None:
        found += [_of_kind(kind, outputs.raw(kind), outputs.name(kind)) for kind in _GUIDED.values()]
        if outputs.boolean("json_object"):
            found.append(_of_schema(None, outputs.name("json_object")))
        if outputs.raw("structural_tag") is not None:
            raise outputs.error("structural_tag", "is not supported by this node; use `tools`")
        outputs.ignore("disable_fallback", "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
    fields.ignore("guided_decoding_backend", "guided_whitespace_pattern")
    return found


def _of_kind(kind: str, value: Any, param: str) -> Constraint | None:
    if value is None:
        return None
    if kind == "json":
        return _of_schema(_parsed(value, param), param)
    if kind == "choice":
        return Constraint(grammar_text.of_choices(_read_choices(value, param)), param)
    if not isinstance(value, str) or not value:
        raise GrammarError(f"`{param}` must be a non-empty string. Given: {shown(value)}", param=param)
    if kind == "regex":
        check_pattern(value, param)
        return Constraint(grammar_text.of_pattern(value), param)
    size = len(value.encode())
    if size > MAX_SCHEMA_BYTES:
        raise GrammarError(f"`{param}` has {size} bytes; the limit is {MAX_SCHEMA_BYTES}", code="schema_too_complex", param=param)
    return Constraint(grammar_text.of_grammar(value, param), param)


def _parsed(value: Any, param: str) -> Any:
    """vLLM takes a schema as an object or as its text."""
    if not isinstance(value, str):
        return value
    if len(value.encode()) > MAX_SCHEMA_BYTES:
        raise GrammarError(
            f"`{param}` has {len(value.encode())} bytes; the limit is {MAX_SCHEMA_BYTES}", code="schema_too_complex", param=param
        )
    try:
        return parse_object(value.encode())
    except RequestError as error:
        raise GrammarError(
            f"`{param}` is a string that holds no JSON object; send the schema as an object", param=param
        ) from error


def _read_choices(value: Any, param: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(choice, str) and choice for choice in value):
        raise GrammarError(f"`{param}` must be a list of non-empty strings. Given: {shown(value)}", param=param)
    if len(value) > _MAX_CHOICES or sum(len(choice.encode()) for choice in value) > MAX_SCHEMA_BYTES:
        raise GrammarError(
            f"`{param}` may hold {_MAX_CHOICES} choices and {MAX_SCHEMA_BYTES} bytes. Given: {len(value)} choices",
            code="schema_too_complex",
            param=param,
        )
    return list(dict.fromkeys(value))
