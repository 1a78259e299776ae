"""How a model writes tool calls: the few shapes that open models were trained on.

Sources: the chat templates of NousResearch's Hermes and Qwen2.5/Qwen3 (`<tool_call>` blocks) and of Meta's Llama 3.1 (a bare
object with `parameters`). A model whose template knows no tools is shown Hermes' shape in a system message.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from node.api.grammar_text import literal, schema_rule

MAX_CALLS = 16  # in one answer


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON schema of type object, `definition` the client's own words.

    Attributes:
        is_strict: Keywords of the schema that cannot be enforced were refused; otherwise they are passed over.
    """

    name: str
    parameters: dict[str, Any]
    definition: dict[str, Any]
    is_strict: bool


@dataclass(frozen=True, slots=True)
class ToolDialect:
    """One way to write a call: `opening` name `middle` arguments `closing`; `trigger` begins `opening` and ends ordinary text.

    Attributes:
        separator: Between two calls; None where an answer holds one call only.
        is_native: The model's chat template shows tools and calls itself.
    """

    trigger: str
    opening: str
    middle: str
    closing: str
    separator: str | None
    is_native: bool

    def write(self, name: str, arguments: Any) -> str:
        """A call as text."""
        return f"{self.opening}{name}{self.middle}{json.dumps(arguments, ensure_ascii=False)}{self.closing}"

    def grammar(
        self, tools: tuple[Tool, ...], *, is_forced: bool, is_parallel: bool, schema: dict[str, Any] | None = None
    ) -> str:
        """Calls of `tools`; unless forced, an answer in text (or JSON of `schema`) instead of or before them.

        The trigger within ordinary text begins a call, which follows its tool's schema from there on: arguments always parse.
        """
        repeats = self.separator is not None and is_parallel
        again = f"({literal(self.separator or '')} call){{0,{MAX_CALLS - 1}}}" if repeats and self.separator else ""
        lines = [f"call: {literal(self.opening)} body", f"body: {self._alternatives(tools)}"]
        if is_forced:
            lines.insert(0, f"start: call {again}")
        elif schema is not None:
            lines.insert(0, f"start: call {again} | {schema_rule(schema)}")
        else:
            rest = self.opening[len(self.trigger) :]
            lines.insert(0, f"start: TEXT | head {literal(rest) if rest else ''} body {again}")
            lines += [r"TEXT: /(.|\n)*/", f"head[lazy]: TEXT {literal(self.trigger)}"]
        return "\n".join(lines) + "\n"

    def _alternatives(self, tools: tuple[Tool, ...]) -> str:
        rules = (schema_rule(tool.parameters, is_lenient=not tool.is_strict) for tool in tools)
        return " | ".join(
            f"{literal(tool.name + self.middle)} {rule} {literal(self.closing)}" for tool, rule in zip(tools, rules, strict=True)
        )


_HERMES = ToolDialect(
    trigger="<tool_call>",
    opening='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    closing="}\n</tool_call>",
    separator="\n",
    is_native=True,
)
_LLAMA = ToolDialect(
    trigger='{"name": "', opening='{"name": "', middle='", "parameters": ', closing="}", separator=None, is_native=True
)
GENERIC = ToolDialect(_HERMES.trigger, _HERMES.opening, _HERMES.middle, _HERMES.closing, _HERMES.separator, is_native=False)


def dialect_of(template_source: str | None, names: frozenset[str]) -> ToolDialect:
    """The dialect of a chat template: `names` are the variables it reads. One that is not known here gets the generic prompt."""
    source = template_source or ""
    if "tools" not in names:
        return GENERIC
    if "<tool_call>" in source and "arguments" in source and "<function=" not in source:
        return _HERMES
    if '"parameters": ' in source and '{"name": ' in source and "[TOOL_CALLS]" not in source:
        return _LLAMA
    return GENERIC
