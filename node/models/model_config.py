"""The configuration of a base model, read from config.json or from a GGUF header, as one `ModelSpec`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from node.errors import ModelLoadError
from node.models.gguf_config import gguf_config
from node.models.gguf_file import GgufFile
from node.models.source import ModelFiles
from node.models.spec import ModelSpec, model_spec

_LIMIT_BYTES = 16 << 20


def read_spec(files: ModelFiles, max_model_len: int | None) -> ModelSpec:
    """Read and check what decoder `files` hold, without reading a weight.

    Raises:
        ModelLoadError: model_unsupported, or model_corrupt for an unreadable configuration.
    """
    if files.kind == "gguf":
        return model_spec(gguf_config(GgufFile(files.weights[0])), max_model_len)
    generation = read_json(files.directory / "generation_config.json")
    stated = generation.get("eos_token_id")
    ids = stated if isinstance(stated, list) else [stated]
    extra = tuple(token_id for token_id in ids if isinstance(token_id, int))
    return model_spec(read_json(files.directory / "config.json"), max_model_len, extra)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} when there is no such file.

    Raises:
        ModelLoadError: model_corrupt. Too large, unreadable, or no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        size = path.stat().st_size
        if size > _LIMIT_BYTES:
            raise ModelLoadError(f"{path} has {size} bytes; at most {_LIMIT_BYTES} are read", code="model_corrupt")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not readable JSON; download the model again", code="model_corrupt") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds no JSON object; download the model again", code="model_corrupt")
    return value
