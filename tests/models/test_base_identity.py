from __future__ import annotations

import json
import shutil

import pytest

from attribution import identity
from node.errors import ModelLoadError
from node.models.base_identity import base_id
from node.models.source import resolve


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
