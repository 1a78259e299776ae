from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys

import pytest

from attribution import identity
from node.errors import EngineError, ModelLoadError
from node.models import base_identity
from node.models.base_identity import base_id, begin_base
from node.models.source import resolve
from node.parent_watch import EXIT_ORPHANED


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "README.md"):
        (path / name).write_text(name)
    return path


@pytest.fixture
def hash_count(monkeypatch):
    """Counts how often files are really hashed."""
    calls = []
    real = identity.base_id
    monkeypatch.setattr(identity, "base_id", lambda files: calls.append(1) or real(files))
    return calls


def test_base_id_equals_attribution_and_ignores_the_place(directory, tmp_path):
    names = ("config.json", "tokenizer.json", "model.safetensors")
    copy = shutil.copytree(directory, tmp_path / "elsewhere")
    (copy / "README.md").write_text("other words")

    first = base_id(resolve(str(directory)), None)

    assert first == identity.base_id({name: directory / name for name in names})
    assert base_id(resolve(str(copy)), None) == first


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_base_id_any_byte_that_decides_changes_it(name, directory):
    before = base_id(resolve(str(directory)), None)
    (directory / name).write_text("changed")

    assert base_id(resolve(str(directory)), None) != before


def test_base_id_unchanged_files_are_hashed_once(directory, tmp_path, hash_count):
    cache = tmp_path / "cache" / "hashes.json"
    first = base_id(resolve(str(directory)), cache)

    assert base_id(resolve(str(directory)), cache) == first
    assert len(hash_count) == 1
    (directory / "model.safetensors").write_text("other weights of another length")
    assert base_id(resolve(str(directory)), cache) != first
    assert len(hash_count) == 2


@pytest.mark.parametrize("content", [b"", b"not json", b"[1]", b"\xff", b'{"base:x": 7}'])
def test_base_id_damaged_cache_is_replaced(content, directory, tmp_path, hash_count):
    cache = tmp_path / "hashes.json"
    cache.write_bytes(content)

    value = base_id(resolve(str(directory)), cache)

    assert len(hash_count) == 1
    assert value in json.loads(cache.read_text()).values()


def test_base_id_gguf_ignores_the_file_name(tmp_path):
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(b"same")

    assert base_id(resolve(str(tmp_path / "one.gguf")), None) == base_id(resolve(str(tmp_path / "two.gguf")), None)


def test_base_id_vanished_file_is_refused(directory):
    files = resolve(str(directory))
    (directory / "model.safetensors").unlink()

    with pytest.raises(ModelLoadError, match="cannot be read"):
        base_id(files, None)


def test_large_model_is_hashed_in_another_process_with_the_same_hash(directory, tmp_path, hash_count, monkeypatch):
    cache = tmp_path / "hashes.json"
    expected = base_id(resolve(str(directory)), None)
    monkeypatch.setattr(base_identity, "APART_BYTES", 1)

    assert base_id(resolve(str(directory)), cache) == expected
    assert expected in cache.read_text()
    assert len(hash_count) == 1  # of `expected`


def test_file_that_the_other_process_cannot_read_is_refused(directory, monkeypatch):
    files = resolve(str(directory))
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()
    monkeypatch.setattr(base_identity, "APART_BYTES", 1)
    monkeypatch.setattr(base_identity, "_named_files", lambda _: {"config.json": directory / "config.json"})

    with pytest.raises(ModelLoadError, match="cannot be read"):
        base_id(files, None)


@pytest.mark.parametrize("script", ["import os; os.kill(os.getpid(), 9)", "import sys; sys.stdin.close(); sys.exit(1)"])
def test_hashing_process_that_is_killed_is_no_fault_of_the_files(script, directory, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{script}'\n")
    program.chmod(0o700)
    monkeypatch.setattr(base_identity, "APART_BYTES", 1)
    monkeypatch.setattr(base_identity.sys, "executable", str(program))

    with pytest.raises(EngineError, match="start again"):
        base_id(resolve(str(directory)), tmp_path / "hashes.json")
    assert not (tmp_path / "hashes.json").exists()


def test_hashing_process_that_cannot_be_started_is_no_fault_of_the_files(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(base_identity, "APART_BYTES", 1)
    monkeypatch.setattr(base_identity.sys, "executable", str(tmp_path / "none"))

    with pytest.raises(EngineError, match="cannot be started"):
        base_id(resolve(str(directory)), None)


def test_cache_that_cannot_be_written_only_costs_time(directory, tmp_path, hash_count, caplog):
    cache = tmp_path / "file" / "hashes.json"
    cache.parent.write_text("no directory")
    expected = identity.base_id({name: directory / name for name in ("config.json", "tokenizer.json", "model.safetensors")})

    assert base_id(resolve(str(directory)), cache) == expected
    assert "hashes the base model again" in caplog.text


def test_disk_that_is_full_leaves_no_half_of_a_cache(directory, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "hashes.json"

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(base_identity.json, "dump", full)

    base_id(resolve(str(directory)), cache)

    assert list(cache.parent.iterdir()) == []


def test_hashing_process_ends_with_its_parent(tmp_path):
    pipe = tmp_path / "pipe"  # opening it to read waits for somebody who writes
    subprocess.run(["mkfifo", str(pipe)], check=True)
    process = subprocess.Popen([sys.executable, "-m", "node.models.hash_process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(json.dumps({"model.safetensors": str(pipe)}).encode() + b"\n")
    process.stdin.close()

    assert process.wait(30) == EXIT_ORPHANED
    assert process.stdout.read() == b""
    process.stdout.close()


def test_begun_base_knows_its_files_at_once_and_its_hash_when_asked(directory):
    begun = begin_base(str(directory), None, None)

    assert begun.files == resolve(str(directory))
    assert begun.wait_for_hash() == base_id(begun.files, None)


def test_begun_base_raises_what_went_wrong_when_asked(directory, monkeypatch):
    monkeypatch.setattr(base_identity, "_named_files", lambda _: {"config.json": directory / "none"})
    begun = begin_base(str(directory), None, None)

    with pytest.raises(ModelLoadError, match="cannot be read"):
        begun.wait_for_hash()
