"""The build script as a module, and what it has built."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def build() -> ModuleType:
    """`scripts/build_contracts.py`, which is a script and not part of any package."""
    spec = importlib.util.spec_from_file_location("build_contracts", ROOT / "scripts" / "build_contracts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def artifacts(build: ModuleType) -> dict[str, dict[str, Any]]:
    """Every committed artifact, by contract name."""
    return {name: json.loads((build.ARTIFACTS / f"{name}.json").read_text()) for name in build.CONTRACT_NAMES}
