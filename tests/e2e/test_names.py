"""`node` and `attribution` are common names: nothing else installed here may answer to them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", ["node", "attribution"])
def test_package_is_provided_by_this_project_alone(package):
    rivals = set(importlib.metadata.packages_distributions().get(package, [])) - {"openlora-node"}
    assert rivals == set(), f"{rivals} also provide {package}; uninstall them from this environment"
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.submodule_search_locations is not None
    assert [Path(place).resolve() for place in found.submodule_search_locations] == [ROOT / package]


@pytest.mark.parametrize("module", ["node/events.py", "node/utils.py", "node/events", "node/utils"])
def test_module_that_rivals_have_is_not_ours(module):
    assert (ROOT / "node").is_dir()
    assert not (ROOT / module).exists()
