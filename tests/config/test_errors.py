"""The error tree: every code is written down, every class keeps its way to the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from node.errors import NodeError, error_from_json, every_error

NODE = Path(__file__).parents[2] / "node"


def test_every_code_that_is_raised_is_listed_in_the_tree() -> None:
    listed = set(re.findall(r"[a-z_]+", (NODE / "errors.py").read_text()))
    raised = {code for path in NODE.rglob("*.py") for code in re.findall(r'code="([a-z_]+)"', path.read_text())}
    assert len(raised) > 40
    assert raised - listed == set()


@pytest.mark.parametrize("kind", every_error(NodeError))
def test_error_survives_the_way_to_another_process(kind: type[NodeError]) -> None:
    error = error_from_json(kind("what happened", param="field", retry_after_s=2.0).to_json())
    assert type(error) is kind
    assert (error.message, error.error_code, error.param, error.retry_after_s) == ("what happened", kind.code, "field", 2.0)
