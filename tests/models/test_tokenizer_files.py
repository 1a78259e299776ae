from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from node.errors import ModelLoadError
from node.models.source import PACKAGED_MODEL, ModelFiles, resolve
from node.models.tokenizer_files import write_tokenizer


@pytest.fixture
def checkpoint(tmp_path):
    """A directory with a small tokenizer that adds bos, truncates and pads."""
    directory = tmp_path / "model"
    directory.mkdir()
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "?": 4}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None, "chat_template": "T1"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def write(checkpoint, tmp_path, eos=(1,)):
    return write_tokenizer(ModelFiles("m", "safetensors", checkpoint, ()), eos, tmp_path / "out")


def special(directory):
    return json.loads((directory / "special_tokens.json").read_text())


def test_write_packaged_model_gives_all_three_files(tmp_path):
    directory = write_tokenizer(resolve(PACKAGED_MODEL), (2,), tmp_path / "deep" / "er")

    assert sorted(path.name for path in directory.iterdir()) == ["chat_template.jinja", "special_tokens.json", "tokenizer.json"]
    found = special(directory)
    assert (found["bos_token"], found["bos_token_id"], found["add_bos"]) == ("<|im_start|>", 1, False)
    assert (found["eos_token"], found["eos_token_id"], found["eos_token_ids"]) == ("<|im_end|>", 2, [2])
    assert "<|im_start|>assistant" in (directory / "chat_template.jinja").read_text()


def test_write_checkpoint_never_truncates_or_pads(checkpoint, tmp_path):
    directory = write(checkpoint, tmp_path)

    assert Tokenizer.from_file(str(directory / "tokenizer.json")).encode("a b a b a").ids == [0, 2, 3, 2, 3, 2]


def test_write_checkpoint_describes_special_tokens(checkpoint, tmp_path):
    found = special(write(checkpoint, tmp_path, eos=(1, 9)))

    assert found["bos_token_id"] == 0
    assert found["add_bos"] is True
    assert found["eos_token_ids"] == [1, 9]
    assert found["pad_token"] is None
    assert found["unk_token_id"] is None


@pytest.mark.parametrize(
    ("stated", "file", "template"),
    [
        ("T1", None, "T1"),
        ("T1", "T2", "T2"),
        ([{"name": "tool", "template": "X"}, {"name": "default", "template": "D"}], None, "D"),
        ([{"name": "tool", "template": "X"}], None, None),
        (None, None, None),
    ],
)
def test_write_chat_template_is_chosen(stated, file, template, checkpoint, tmp_path):
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": stated}))
    if file is not None:
        (checkpoint / "chat_template.jinja").write_text(file)
    stale = tmp_path / "out" / "chat_template.jinja"
    stale.parent.mkdir()
    stale.write_text("of an earlier model")

    path = write(checkpoint, tmp_path) / "chat_template.jinja"

    assert (path.read_text() if path.exists() else None) == template


def test_write_without_tokenizer_names_the_remedy(tmp_path):
    with pytest.raises(ModelLoadError, match="save_pretrained") as caught:
        write(tmp_path, tmp_path)

    assert caught.value.error_code == "model_not_found_on_disk"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_write_damaged_file_is_refused(name, checkpoint, tmp_path):
    (checkpoint / name).write_text("{not json")

    with pytest.raises(ModelLoadError, match=name) as caught:
        write(checkpoint, tmp_path)

    assert caught.value.error_code == "model_corrupt"


def test_write_to_unwritable_place_is_refused(checkpoint, tmp_path):
    (tmp_path / "out").write_text("a file where a directory must be")

    with pytest.raises(ModelLoadError, match="cannot be written"):
        write(checkpoint, tmp_path)
