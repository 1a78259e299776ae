"""`openlora-node adapters gc` on a real cache directory, without a running node."""

from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

from node.cli.main import app


@pytest.fixture
def cache(tmp_path):
    for name, used_s in (("older", 1_000.0), ("newer", 2_000.0)):
        directory = tmp_path / "adapters" / "s3" / name / "1"
        directory.mkdir(parents=True)
        (directory / "adapter_model.safetensors").write_bytes(b"x" * 1000)
        (directory / ".used").touch()
        os.utime(directory / ".used", (used_s, used_s))
    return tmp_path


def run(cache, *arguments):
    return CliRunner().invoke(app, ["adapters", "gc", "--data-dir", str(cache), *arguments])


def test_gc_to_a_size_removes_the_least_recently_used(cache):
    done = run(cache, "--to", "1500", "--json")

    assert done.exit_code == 0, done.output
    assert [item["directory"].split("/")[-2] for item in json.loads(done.output)["removed"]] == ["older"]
    assert json.loads(done.output)["left_bytes"] == 1000


def test_gc_within_the_limit_removes_nothing(cache):
    done = run(cache)

    assert (done.exit_code, done.output.strip()) == (0, "0 removed, 2 left (2000 bytes)")


def test_gc_to_no_size_says_what_a_size_is(cache):
    done = run(cache, "--to", "10GBB")

    assert done.exit_code != 0
    assert "KiB" in done.output
