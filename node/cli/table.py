"""Tables and JSON on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_PIPE_WIDTH = 240  # a pipe has no width; nothing should be folded for it


def print_json(value: Any) -> None:
    """Print `value` as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], empty: str) -> None:
    """Print one line a row; `columns` maps keys to headings; `empty` is said when there are no rows."""
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    if not rows:
        console.print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in columns.values():
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(str(row[key]) for key in columns))
    console.print(table)
