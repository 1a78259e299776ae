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


@pytest.mark.usefixtures("available_isas")  # builds, or skips where no compiler is
def test_build_a_second_time_compiles_nothing(monkeypatch):
    path = build.build()
    monkeypatch.setattr(subprocess, "run", None)
    assert build.build() == path == build.library_path()


def test_compiler_missing_names_the_remedy(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler found"):
        build._require_compiler()


def test_build_command_without_a_compiler_says_so_and_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "_cached", lambda sources: tmp_path / "absent.so")
    assert build.main() == 1
    assert "apt install g++" in capsys.readouterr().err


def test_compiler_failure_is_a_config_error():
    with pytest.raises(ConfigError, match="status 3"):
        build._run(["sh", "-c", "exit 3"])
