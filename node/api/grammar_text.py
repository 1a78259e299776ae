"""What a client asks of an answer's form, written in the one notation that the engine reads: llguidance's Lark."""

from __future__ import annotations

import json
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from node.api.closed_schema import closed
from node.errors import GrammarError

# Unlimited white space is where small models get lost until the token budget ends: a space, or a new line and its indentation.
_WHITESPACE = r"\n[ ]{0,32}|[ ]?"


def of_schema(schema: dict[str, Any]) -> str:
    """JSON that follows a schema."""
    return f"start: {schema_rule(schema)}"


def schema_rule(schema: dict[str, Any], *, is_lenient: bool = False) -> str:
    """A schema as an expression within a grammar, closed (`closed_schema`). `is_lenient` passes over what cannot be enforced."""
    options = {"whitespace_pattern": _WHITESPACE, "lenient": is_lenient}
    return "%json " + json.dumps({**closed(schema), "x-guidance": options}, ensure_ascii=False)


def of_pattern(pattern: str) -> str:
    """Text that a regular expression matches from end to end. `\\d` is 0 to 9; anchors at the ends change nothing."""
    return f"start: /{regex_to_lark(pattern, 'd')}/"


def of_choices(choices: list[str]) -> str:
    """Exactly one of some texts."""
    return "start: " + " | ".join(literal(choice) for choice in choices)


def literal(text: str) -> str:
    """A text as a terminal; Lark's strings have JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)


def of_grammar(text: str, param: str) -> str:
    """Lark, or GBNF (`root ::= ...`), which is translated.

    Raises:
        GrammarError: GBNF that cannot be read.
    """
    if "::=" not in text:
        if text.lstrip().startswith("{"):
            raise GrammarError(f"`{param}` must be a grammar in Lark or GBNF notation, not JSON", param=param)
        return text
    try:
        lark: str = gbnf_to_lark(text)
    except (GbnfToLarkError, ValueError, LookupError, RecursionError) as error:
        raise GrammarError(f"`{param}` is no valid GBNF grammar; a rule reads `name ::= expression`", param=param) from error
    return lark
