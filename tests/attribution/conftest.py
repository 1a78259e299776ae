"""The golden vectors and the script that writes them, for every test of the package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

VECTORS = Path(__file__).parent.parent / "vectors"


@pytest.fixture(scope="session")
def generator() -> ModuleType:
    """tests/vectors/generate.py, for its sample facts and keys."""
    spec = importlib.util.spec_from_file_location("vectors_generate", VECTORS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def vectors() -> Any:
    """Reads one vector file by name."""
    return lambda name: json.loads((VECTORS / name).read_text())
