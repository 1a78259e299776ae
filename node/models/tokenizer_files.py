"""What the API process needs to turn text into tokens and back, written where it can read it without torch.

The directory holds `tokenizer.json` (for the `tokenizers` library; encoding with special tokens adds what the model expects
around a prompt), `chat_template.jinja` where the model has one, and `special_tokens.json`:

    {"bos_token": "<s>", "bos_token_id": 1, "eos_token": ..., "pad_token": null, ..., "eos_token_ids": [2], "add_bos": true}
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from node.errors import ModelLoadError
from node.models.gguf_file import GgufFile
from node.models.gguf_tokenizer import gguf_tokenizer
from node.models.model_config import read_json
from node.models.source import ModelFiles

_NAMES = ("bos", "eos", "pad", "unk")
_GGUF_NAMES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


@dataclass(frozen=True, slots=True)
class _Parts:
    """A tokenizer, the texts of its special tokens by name, and its chat template or None."""

    tokenizer: Tokenizer
    texts: Mapping[str, str]
    chat_template: str | None


def write_tokenizer(files: ModelFiles, eos_token_ids: tuple[int, ...], directory: Path) -> Path:
    """Write the tokenizer of a model into `directory`, replacing what an earlier version wrote; return the directory.

    Args:
        files: The model.
        eos_token_ids: From `ModelSpec`.
        directory: Created when missing.

    Raises:
        ModelLoadError: model_not_found_on_disk without a tokenizer.json, model_corrupt or model_unsupported for one that
            cannot be used, or when the directory cannot be written.
    """
    parts = _from_gguf(GgufFile(files.weights[0])) if files.kind == "gguf" else _from_directory(files.directory)
    described = {**_special_tokens(parts), "eos_token_ids": list(eos_token_ids)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _replace(directory / "tokenizer.json", parts.tokenizer.to_str())
        _replace(directory / "special_tokens.json", json.dumps(described, ensure_ascii=False, indent=1))
        if parts.chat_template is not None:
            _replace(directory / "chat_template.jinja", parts.chat_template)
        else:
            (directory / "chat_template.jinja").unlink(missing_ok=True)
    except OSError as error:
        raise ModelLoadError(f"the tokenizer cannot be written to {directory}; check free space and permissions") from error
    return directory


def _from_gguf(file: GgufFile) -> _Parts:
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    ids = {name: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _GGUF_NAMES.items()}
    texts = {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    return _Parts(gguf_tokenizer(file), texts, file.metadata.get("tokenizer.chat_template"))


def _from_directory(directory: Path) -> _Parts:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelLoadError(
            f"{directory} has no tokenizer.json; save the model's fast tokenizer there with transformers' save_pretrained",
            code="model_not_found_on_disk",
        )
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # `tokenizers` raises no narrower type
        raise ModelLoadError(
            f"{path} is not a tokenizer of the tokenizers library; download the model again", code="model_corrupt"
        ) from error
    tokenizer.no_truncation()  # a server reports a prompt that is too long; it never shortens one
    tokenizer.no_padding()
    config = {**read_json(directory / "special_tokens_map.json"), **read_json(directory / "tokenizer_config.json")}
    texts = {name: text for name in _NAMES if (text := _text(config.get(name + "_token"))) is not None}
    return _Parts(tokenizer, texts, _chat_template(directory, config))


def _text(value: Any) -> str | None:
    """A special token is written as a string or as an object with its `content`."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's; of several named templates the one named default."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    stated = config.get("chat_template")
    if isinstance(stated, list):
        named = {item.get("name"): item.get("template") for item in stated if isinstance(item, dict)}
        stated = named.get("default")
    return stated if isinstance(stated, str) else None


def _special_tokens(parts: _Parts) -> dict[str, Any]:
    """Texts and ids, null where the model has none. Whether encoding adds bos is asked of the tokenizer, which is what runs."""
    described: dict[str, Any] = {}
    for name in _NAMES:
        text = parts.texts.get(name)
        token_id = parts.tokenizer.token_to_id(text) if text is not None else None
        described[f"{name}_token"] = text if token_id is not None else None
        described[f"{name}_token_id"] = token_id
    bos = described["bos_token_id"]
    return {**described, "add_bos": bos is not None and parts.tokenizer.encode("a").ids[:1] == [bos]}


def _replace(path: Path, text: str) -> None:
    """Write in one step, so that a reader never sees half a file."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".new-", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
