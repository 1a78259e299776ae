"""Reading `tools`, `tool_choice` and `parallel_tool_calls` of a chat request."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from node.api.fields import Fields, shown
from node.api.schema_limits import check_schema
from node.api.structured_fields import Constraint
from node.api.tool_dialect import Tool, ToolDialect
from node.errors import GrammarError, RequestError, UnsupportedError

_MAX_TOOLS = 128  # OpenAI's
_MAX_DESCRIPTION_CHARS = 16 << 10
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says about tools; `tools` are those that may be called, none when calls are off.

    Attributes:
        is_forced: The answer is a call. prompt: LoRAX's `tool_prompt`, words that introduce the tools.
    """

    tools: tuple[Tool, ...] = ()
    is_forced: bool = False
    is_parallel: bool = True
    prompt: str | None = None

    def constraint(self, dialect: ToolDialect, other: Constraint | None) -> Constraint | None:
        """The form of an answer that may call tools, or must be as `other` says.

        Raises:
            RequestError: Both, where `other` is no JSON schema.
        """
        if not self.tools:
            return other
        if other is not None and other.schema is None:
            raise RequestError(f"`{other.param}` cannot be combined with `tools`; only a JSON schema can", param=other.param)
        schema = None if other is None else other.schema
        grammar = dialect.grammar(self.tools, is_forced=self.is_forced, is_parallel=self.is_parallel, schema=schema)
        return Constraint(grammar, "tools")


def read_tools(fields: Fields) -> ToolUse:
    """Check tools and the choice among them.

    Raises:
        RequestError: Malformed, repeated or unknown names. GrammarError: Parameters that are no JSON schema of an object.
        UnsupportedError: Tools other than functions.
    """
    items = fields.items("tools", _MAX_TOOLS) or []
    tools = tuple(_read_tool(item, f"tools[{index}]") for index, item in enumerate(items))
    names = [tool.name for tool in tools]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise RequestError(f"`tools` has two functions named {repeated!r}; names must differ", param="tools")
    mode, chosen_names = _read_choice(fields, names)
    if mode == "none" or not tools:
        return ToolUse()
    if fields.boolean("ignore_eos") or fields.boolean("ignore_eos_token"):
        raise RequestError("`tools` say where the answer ends, so the end of sequence cannot be ignored with them", param="tools")
    is_parallel = fields.boolean("parallel_tool_calls", default=True)
    return ToolUse(
        tuple(tool for tool in tools if chosen_names is None or tool.name in chosen_names),
        is_forced=mode != "auto",
        is_parallel=is_parallel and mode != "named",
        prompt=fields.text("tool_prompt", _MAX_DESCRIPTION_CHARS),
    )


def _read_tool(item: Any, param: str) -> Tool:
    if not isinstance(item, dict):
        raise RequestError(f"`{param}` must be an object with type and function. Given: {shown(item)}", param=param)
    outer = Fields(item, prefix=f"{param}.")
    kind = outer.text("type", 64)
    if kind not in (None, "function"):
        raise UnsupportedError(
            f"`{param}.type` {kind!r} is not supported by this node; only functions are", param=f"{param}.type"
        )
    inner = outer.inner("function")
    if inner is None:
        raise outer.error("function", "must be an object with a name")
    name = inner.text("name", 64) or ""
    if not _NAME.fullmatch(name):
        raise inner.error("name", "must have 1 to 64 letters, digits, underscores or dashes")
    inner.text("description", _MAX_DESCRIPTION_CHARS)
    parameters = _read_parameters(inner, f"{param}.function.parameters")
    return Tool(name, parameters, {"type": "function", **item}, inner.boolean("strict"))


def _read_parameters(inner: Fields, param: str) -> dict[str, Any]:
    """No parameters is a function without arguments."""
    value = inner.raw("parameters")
    if value is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    schema = check_schema(value, param)
    if schema.get("type", "object") != "object":
        raise GrammarError(f'`{param}` must describe an object ("type": "object"). Given: {shown(schema["type"])}', param=param)
    return {**schema, "type": "object"}


def _read_choice(fields: Fields, names: list[str]) -> tuple[str, frozenset[str] | None]:
    """(none, auto, required or named; the functions to choose from, None for all). LoRAX takes a function's bare name as well."""
    value = fields.raw("tool_choice")
    if value is None or value == "auto":
        return "auto", None
    if value in ("none", "required"):
        if value == "required" and not names:
            raise fields.error("tool_choice", 'is "required", and `tools` is empty')
        return value, None
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        return _read_allowed(fields, value, names)
    name = value if isinstance(value, str) else _named(value)
    if name is None:
        raise fields.error("tool_choice", 'must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}')
    return "named", _known(fields, [name], names)


def _read_allowed(fields: Fields, value: dict[str, Any], names: list[str]) -> tuple[str, frozenset[str]]:
    """OpenAI's `{"type": "allowed_tools", "allowed_tools": {"mode", "tools"}}`."""
    inner = value.get("allowed_tools")
    mode, listed = (inner.get("mode"), inner.get("tools")) if isinstance(inner, dict) else (None, None)
    found = [_named(item) for item in listed] if isinstance(listed, list) else []
    allowed = [name for name in found if name is not None]
    if mode not in ("auto", "required") or not allowed or len(allowed) != len(found):
        raise fields.error("tool_choice", 'must hold `allowed_tools` with mode "auto" or "required" and a list of functions')
    return mode, _known(fields, allowed, names)


def _known(fields: Fields, chosen: list[str], names: list[str]) -> frozenset[str]:
    unknown = next((name for name in chosen if name not in names), None)
    if unknown is not None:
        raise fields.error("tool_choice", f"names {unknown[:64]!r}, which is not in `tools`")
    return frozenset(chosen)


def _named(value: Any) -> str | None:
    function = value.get("function") if isinstance(value, dict) and value.get("type", "function") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None
