"""Messages to prompt text through the base model's own chat template, in a sandbox, within limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from node.api.tokenizer import SpecialTokens
from node.api.tool_dialect import dialect_of
from node.errors import ModelLoadError, RequestError, UnsupportedError

_MAX_TEMPLATE_BYTES = 1 << 20


class _TemplateRefusal(Exception):
    """Raised by `raise_exception(...)` inside a template; its text is the model author's, not ours, and is not shown."""


class ChatTemplate:
    """The template of the base model. A request or an adapter can never bring its own.

    Args:
        source: Jinja source, or None for a model without a template: chat is then refused by name.
        now: Clock for templates that print the date.
        max_chars: Longest prompt text a template may produce; rendering stops as soon as it is exceeded.
    """

    def __init__(self, source: str | None, special: SpecialTokens, now: Callable[[], datetime], max_chars: int = 8 << 20) -> None:
        self._special = special
        self._now = now
        self._max_chars = max_chars
        self._template = None if source is None else self._compile(source)
        self.dialect = dialect_of(source, self._variables(source))

    @classmethod
    def open(cls, directory: Path, special: SpecialTokens, now: Callable[[], datetime]) -> ChatTemplate:
        """Read `chat_template.jinja`, which may be missing.

        Raises:
            ModelLoadError: The template is too large or is not Jinja.
        """
        path = directory / "chat_template.jinja"
        if not path.is_file():
            return cls(None, special, now)
        if path.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise ModelLoadError(
                f"{path} has {path.stat().st_size} bytes, more than {_MAX_TEMPLATE_BYTES}; it is no chat template"
            )
        return cls(path.read_text(encoding="utf-8"), special, now)

    def render(self, messages: tuple[dict[str, Any], ...], tools: tuple[dict[str, Any], ...] = ()) -> str:
        """Prompt text that ends where the assistant's answer begins. `tools` only for a dialect that `is_native`.

        Raises:
            UnsupportedError: The base model has no chat template.
            RequestError: The template refuses these messages (order of roles, no system message, ...) or the text is too long.
        """
        if self._template is None:
            raise UnsupportedError("the base model has no chat template; use /v1/completions with a prompt", param="messages")
        values = {
            "messages": list(messages),
            "add_generation_prompt": True,
            "bos_token": self._special.bos_token or "",
            "eos_token": self._special.eos_token or "",
            "tools": list(tools) or None,
            "documents": None,
        }
        try:
            return self._collect(self._template.generate(values))
        except (_TemplateRefusal, jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise RequestError(
                "the model's chat template does not accept these messages; most templates want an optional system message first, "
                f"then user and assistant in turns. Given roles: {[message['role'] for message in messages][:16]}",
                param="messages",
            ) from error

    def _collect(self, pieces: Any) -> str:
        """Join the pieces; the limit is checked while rendering, because a template may multiply its input."""
        parts: list[str] = []
        count = 0
        for piece in pieces:
            count += len(piece)
            if count > self._max_chars:
                raise RequestError(
                    f"the prompt made from `messages` has more than {self._max_chars} characters; shorten it", param="messages"
                )
            parts.append(piece)
        return "".join(parts)

    def _variables(self, source: str | None) -> frozenset[str]:
        if source is None:
            return frozenset()
        return frozenset(jinja2.meta.find_undeclared_variables(_environment(self._now).parse(source)))

    def _compile(self, source: str) -> jinja2.Template:
        try:
            return _environment(self._now).from_string(source)
        except jinja2.TemplateError as error:
            raise ModelLoadError("the model's chat_template.jinja is not a Jinja template; fix or remove it") from error


def _environment(now: Callable[[], datetime]) -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    environment.globals.pop("lipsum", None)
    return environment


def _refuse(message: str) -> None:
    raise _TemplateRefusal(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """As transformers has it: no HTML escaping, unlike Jinja's own filter."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
