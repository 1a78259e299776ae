"""One check of `openlora-node doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was looked at, how it stands and, unless it is fine, what to do."""

    subject: str
    state: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""
