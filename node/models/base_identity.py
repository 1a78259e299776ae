"""The content hash of a base model, remembered between starts.

Hashing 100 MB takes 0.1 s and 15 GB takes a quarter of a minute: a file whose device, inode, size and time of change are
those of an earlier start is not read again.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from attribution import canonical, identity
from attribution.errors import IdentityError
from node.errors import ModelLoadError
from node.models.source import ModelFiles

_ENTRY_LIMIT = 256
_SIDE_FILES = ("config.json", "tokenizer.json")  # beside safetensors; a GGUF file holds everything itself


def base_id(files: ModelFiles, cache_file: Path | None) -> str:
    """Content hash of the model, 64 hex digits; independent of where the files are.

    Args:
        files: The model.
        cache_file: JSON object that remembers hashes, created when missing; None to hash every time.

    Raises:
        ModelLoadError: model_corrupt. A file cannot be read or changes while it is read.
    """
    named = _named_files(files)
    try:
        key = _key(named)
        known = _read_cache(cache_file)
        if key in known:
            return known[key]
        value = identity.base_id(named)
        if _key(named) != key:
            raise ModelLoadError(f"the files of {files.model_id} changed while they were read; start again", code="model_corrupt")
        if cache_file is not None:
            _write_cache(cache_file, {**known, key: value})
        return value
    except (OSError, IdentityError) as error:
        raise ModelLoadError(
            f"the files of {files.model_id} in {files.directory} cannot be read", code="model_corrupt"
        ) from error


def _named_files(files: ModelFiles) -> dict[str, Path]:
    if files.kind == "gguf":
        return {"model.gguf": files.weights[0]}
    beside = {name: files.directory / name for name in _SIDE_FILES if (files.directory / name).is_file()}
    return {**{file.name: file for file in files.weights}, **beside}


def _key(named: dict[str, Path]) -> str:
    """What must be unchanged for a remembered hash to hold."""
    stats = [(name, os.stat(named[name])) for name in sorted(named)]
    return "base:" + canonical.digest([[name, *map(str, (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns))] for name, s in stats])


def _read_cache(cache_file: Path | None) -> dict[str, str]:
    """A cache that is missing or damaged only costs time."""
    try:
        known = json.loads(cache_file.read_bytes()) if cache_file is not None else {}
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_cache(cache_file: Path, known: dict[str, str]) -> None:
    """Replace the file in one step, so that a reader never sees half of it. The oldest entries go first."""
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    kept = dict(list(known.items())[-_ENTRY_LIMIT:])
    with tempfile.NamedTemporaryFile("w", dir=cache_file.parent, prefix=".hashes-", delete=False) as file:
        json.dump(kept, file)
    os.replace(file.name, cache_file)
