"""Structured logs on stderr: JSON lines for machines, coloured lines for people.

No prompt, no answer, no key and no voucher is ever an argument of a log call; `redact` is the second net under that rule.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Literal, TextIO

import structlog

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_SECRET_FIELDS = ("authorization", "api_key", "api_token", "token", "password", "private_key", "secret", "signature", "voucher")
_TEXT_FIELDS = ("prompt", "messages", "inputs", "content", "completion", "generated_text")


def make_logger(
    level: Literal["debug", "info", "warning", "error"],
    form: Literal["auto", "json", "console"],
    stream: TextIO | None = None,
) -> structlog.typing.FilteringBoundLogger:
    """A logger of its own, configured by arguments and not through structlog's process-wide configuration.

    Args:
        level: Lowest level that is written.
        form: "auto" is console on a terminal and JSON elsewhere.
        stream: Where lines go; None is stderr.
    """
    target = sys.stderr if stream is None else stream
    is_console = form == "console" or (form == "auto" and target.isatty())
    renderer: Any = structlog.dev.ConsoleRenderer(colors=target.isatty()) if is_console else structlog.processors.JSONRenderer()
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        redact,
        structlog.processors.format_exc_info,
        renderer,
    ]
    logger: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(target),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
    )
    return logger


class _Passing(logging.Handler):
    """Hands on what comes through Python's own logging."""

    def __init__(self, logger: structlog.typing.FilteringBoundLogger) -> None:
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._logger.log(record.levelno, record.getMessage(), source=record.name, exc_info=record.exc_info)
        except (OSError, ValueError):  # a stderr that nobody reads any more must not end whoever wrote the line
            self.handleError(record)


@contextmanager
def passing_on(logger: structlog.typing.FilteringBoundLogger) -> Iterator[None]:
    """Let the block hear what the node's modules say through Python's own logging, the lines of its child processes among it.

    That logging is process-wide, so this is for the program and not for a room.
    """
    modules, handler = logging.getLogger("node"), _Passing(logger)
    level = modules.level
    modules.addHandler(handler)
    modules.setLevel(logging.INFO)
    try:
        yield
    finally:
        modules.setLevel(level)
        modules.removeHandler(handler)


def redact(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace what must not be written down: secrets entirely, texts by their length."""
    for key, value in event.items():
        lowered = key.lower()
        if any(lowered == name or lowered.endswith("_" + name) for name in _SECRET_FIELDS):
            event[key] = "[redacted]"
        elif lowered in _TEXT_FIELDS:
            event[key] = f"[{len(value)} items]" if hasattr(value, "__len__") else "[redacted]"
    return event
