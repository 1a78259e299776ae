"""The content hash of a base model, remembered between starts.

A file whose device, inode, size and time of change are those of an earlier start is not read again. A model of gigabytes is
hashed in a process of its own, beside everything else that a start does.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from attribution import canonical, identity
from attribution.errors import IdentityError
from node.child_process import child_environment
from node.errors import ModelLoadError
from node.models.source import ModelFiles, resolve

HASH_CACHE = "model_hashes.json"  # in the engine's state directory
APART_BYTES = 1 << 30  # a smaller model is hashed before another process has begun
_ENTRY_LIMIT = 256
_SIDE_FILES = ("config.json", "tokenizer.json")  # beside safetensors; a GGUF file holds everything itself

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BegunBase:
    """A base model whose files are known and being hashed.

    Attributes:
        files: Where they are.
        wait_for_hash: Returns what `base_id` returns, or raises what it raises.
    """

    files: ModelFiles
    wait_for_hash: Callable[[], str]


def begin_base(path_or_id: str, revision: str | None, cache_file: Path | None) -> BegunBase:
    """Find a base model and begin to hash it on a thread. Needs no torch, so that it can come before torch is imported.

    Args:
        path_or_id, revision: See `node.models.source.resolve`.
        cache_file: See `base_id`.

    Raises:
        ModelLoadError: model_not_found_on_disk.
    """
    files = resolve(path_or_id, revision)
    threads = ThreadPoolExecutor(1, thread_name_prefix="base-hash")
    begun = threads.submit(base_id, files, cache_file)
    threads.shutdown(wait=False)
    return BegunBase(files, begun.result)


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
        is_large = sum(file.stat().st_size for file in files.weights) >= APART_BYTES
        begun_s = time.monotonic()
        value = _hash_apart(named) if is_large else identity.base_id(named)
        logger.info("the base model was hashed in %.2f s", time.monotonic() - begun_s)
        if _key(named) != key:
            raise ModelLoadError(f"the files of {files.model_id} changed while they were read; start again", code="model_corrupt")
        if cache_file is not None:
            _write_cache(cache_file, {**known, key: value})
        return value
    except (OSError, IdentityError) as error:
        raise ModelLoadError(
            f"the files of {files.model_id} in {files.directory} cannot be read", code="model_corrupt"
        ) from error


def _hash_apart(named: Mapping[str, Path]) -> str:
    """`identity.base_id` in a process of its own.

    Raises:
        OSError: It cannot be started. IdentityError: It could not read the files.
    """
    command = [sys.executable, "-P", "-m", "node.models.hash_process"]
    with subprocess.Popen(  # noqa: S603 - our own module
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment()
    ) as process:
        if process.stdin is None or process.stdout is None:
            raise IdentityError("the process that hashes the base model was started without pipes")
        process.stdin.write(json.dumps({name: str(path.absolute()) for name, path in named.items()}).encode() + b"\n")
        process.stdin.flush()  # and stays open: its end would be this process's
        value = process.stdout.read().decode()
    if process.returncode != 0:
        raise IdentityError(f"the process that hashes the base model ended with status {process.returncode}")
    return value


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
