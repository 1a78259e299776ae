"""Finding sources and a compiler, and the cache of built libraries."""

import subprocess

import pytest

from node.errors import ConfigError
from node.kernels import build


def test_source_dir_holds_every_source():
    assert all((build.source_dir() / name).is_file() for name in build.SOURCES)


def test_library_path_changes_with_a_source(tmp_path):
    (tmp_path / "a.cc").write_text("int a;")
    before = build._digest(tmp_path)
    (tmp_path / "a.cc").write_text("int b;")
    assert build._digest(tmp_path) != before


def test_build_a_second_time_compiles_nothing(monkeypatch):
    path = build.build()
    monkeypatch.setattr(subprocess, "run", None)
    assert build.build() == path == build.library_path()


def test_compiler_missing_names_the_remedy(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler found"):
        build._compiler()


def test_compiler_failure_is_a_config_error():
    with pytest.raises(ConfigError, match="status 3"):
        build._run(["sh", "-c", "exit 3"])
