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
from node.errors import EngineError, ModelLoadError
from node.models.hash_process import EXIT_UNREADABLE
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
        EngineError: engine_failed. The process that hashes a large model cannot be started, or was ended by somebody else.
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
    except (OSError, IdentityError) as error:
        raise ModelLoadError(
            f"the files of {files.model_id} in {files.directory} cannot be read; check that they exist and their permissions",
            code="model_corrupt",
        ) from error
    _remember(cache_file, {**known, key: value})
    return value


def _hash_apart(named: Mapping[str, Path]) -> str:
    """`identity.base_id` in a process of its own.

    Raises:
        IdentityError: It could not read the files. EngineError: See `base_id`.
    """
    command = [sys.executable, "-P", "-m", "node.models.hash_process"]
    question = json.dumps({name: str(path.absolute()) for name, path in named.items()}).encode() + b"\n"
    try:
        with subprocess.Popen(  # noqa: S603 - our own module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment()
        ) as process:
            value = _answer(process, question)
    except OSError as error:
        raise _lost(f"cannot be started or asked (errno {error.errno})") from error
    if process.returncode == EXIT_UNREADABLE:
        raise IdentityError("the process that hashes the base model cannot read its files")
    if process.returncode != 0:
        raise _lost(f"ended with status {process.returncode}")
    return value


def _answer(process: subprocess.Popen[bytes], question: bytes) -> str:
    if process.stdin is None or process.stdout is None:
        raise _lost("was started without pipes")
    process.stdin.write(question)
    process.stdin.flush()  # and stays open: its end would be this process's
    return process.stdout.read().decode()


def _lost(what: str) -> EngineError:
    return EngineError(
        f"the process that hashes the base model {what}; check the machine's memory and limits, then start again",
        code="engine_failed",
    )


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


def _remember(cache_file: Path | None, known: dict[str, str]) -> None:
    """A cache that cannot be written only costs time, too: the next start hashes again."""
    if cache_file is None:
        return
    try:
        _write_cache(cache_file, known)
    except OSError as error:
        logger.warning("%s cannot be written (errno %s): the next start hashes the base model again", cache_file, error.errno)


def _write_cache(cache_file: Path, known: dict[str, str]) -> None:
    """Replace the file in one step, so that a reader never sees half of it. The oldest entries go first."""
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    kept = dict(list(known.items())[-_ENTRY_LIMIT:])
    with tempfile.NamedTemporaryFile("w", dir=cache_file.parent, prefix=".hashes-", delete=False) as file:
        temporary = Path(file.name)
        try:
            json.dump(kept, file)
            file.flush()
            os.replace(temporary, cache_file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
