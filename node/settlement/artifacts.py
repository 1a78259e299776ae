"""The compiled contracts that travel with the node: `abi/<Name>.json`, built from `contracts/` and checked against it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CONTRACTS = ("TestToken", "AttributionRewards", "UsageEscrow", "AdapterRegistry")
_DIRECTORY = Path(__file__).parent / "abi"


@dataclass(frozen=True, slots=True)
class Artifact:
    """One contract: its interface and its creation code."""

    name: str
    abi: list[dict[str, Any]]
    bytecode: bytes


@cache
def artifact(name: str) -> Artifact:
    """Read one of `CONTRACTS`; the files never change while the node runs.

    Raises:
        FileNotFoundError: The installation is incomplete.
    """
    fields = json.loads((_DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))
    return Artifact(name, fields["abi"], bytes.fromhex(fields["bytecode"].removeprefix("0x")))
