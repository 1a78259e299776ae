"""Every committed figure says on which machine and from which sources it was measured, or stands below a row that does."""

import json

import pytest

from node.kernels.build import source_dir

FILES = sorted((source_dir() / "results").glob("*.jsonl"))
MACHINE = {"cpu", "cores", "machine", "gpu", "engine"}  # engine: figures of the scheduler alone, which no machine changes


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_figures_name_commit_and_machine(path):
    above: dict = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        row = json.loads(line)
        if row.get("row") in ("machine", "run"):
            above = row
        facts = above | row
        assert facts.get("commit"), f"{path.name}:{number} names no commit"
        assert MACHINE & facts.keys(), f"{path.name}:{number} names no machine"
        if path.stem.endswith("-h100"):
            assert "H100" in str([above, row]), f"{path.name}:{number} names no GPU"
