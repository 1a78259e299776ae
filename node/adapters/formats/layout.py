"""Which files make an adapter, and where they lie: PEFT's own directory, Ludwig's output around one, or one GGUF file.

Ludwig calls PEFT's `save_pretrained` on the directory `model_weights` of a model (its `MODEL_WEIGHTS_FILE_NAME`), and keeps the
model in `model` of an experiment's results; its upload to the hub sends the inside of `model_weights` alone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from node.errors import AdapterInvalidError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "manifest.json"
GGUF_ENDING = ".gguf"
LUDWIG_DIRECTORIES = ("model_weights", "model/model_weights")
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_DIRECTORY_ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """The files of one adapter. `config` is None for a GGUF adapter, which carries its configuration inside."""

    weights: Path
    config: Path | None

    @property
    def is_gguf(self) -> bool:
        return self.config is None


def locate(directory: Path) -> AdapterLayout:
    """Find an adapter's files in its directory. PEFT's own place costs one file status.

    Raises:
        AdapterInvalidError: adapter_format_unsupported (no adapter in a format this node reads), adapter_corrupt (several GGUF
            files, too many entries).
    """
    if os.path.lexists(directory / WEIGHTS_FILE):
        return AdapterLayout(directory / WEIGHTS_FILE, directory / CONFIG_FILE)
    for part in LUDWIG_DIRECTORIES:
        inner = directory / part
        if _is_inside(directory, part) and os.path.lexists(inner / WEIGHTS_FILE):
            return AdapterLayout(inner / WEIGHTS_FILE, inner / CONFIG_FILE)
    names = listed(directory)
    _refuse_scripts(names)
    chosen = _one_gguf(names)
    if chosen is None:
        raise _no_weights([*names, *(f"{part}/{name}" for part in LUDWIG_DIRECTORIES for name in _inner(directory, part))])
    return AdapterLayout(directory / chosen, None)


def wanted_files(names: Iterable[str]) -> dict[str, str]:
    """Of all files a source has under a name, those that make the adapter: {path at the source: name in the directory here}.

    Raises:
        AdapterInvalidError: adapter_code_refused (Python files), adapter_format_unsupported (no weights in a format read here).
    """
    found = sorted(names)
    _refuse_scripts(found)
    known = set(found)
    for prefix in ("", *(f"{part}/" for part in LUDWIG_DIRECTORIES)):
        if prefix + WEIGHTS_FILE in known:
            inner = [prefix + file for file in (CONFIG_FILE, WEIGHTS_FILE)] + [MANIFEST_FILE]
            return {path: path.rpartition("/")[2] for path in inner if path in known}
    chosen = _one_gguf([name for name in found if "/" not in name])
    if chosen is None:
        raise _no_weights(found)
    return {path: path for path in (chosen, MANIFEST_FILE) if path in known}


def is_weights(path: str) -> bool:
    """Whether a file of `wanted_files` holds weights: the one that may be large."""
    return path.endswith((WEIGHTS_FILE, GGUF_ENDING))


def is_adapter(directory: Path) -> bool:
    """Whether the directory seems to hold an adapter; decides what a listing shows, not what is served."""
    places = [directory, *(directory / part for part in LUDWIG_DIRECTORIES)]
    if any(os.path.lexists(place / CONFIG_FILE) for place in places):
        return True
    if not directory.is_dir():
        return False
    try:
        return any(name.endswith(GGUF_ENDING) for name in listed(directory))
    except (AdapterInvalidError, OSError):
        return False


def listed(directory: Path) -> list[str]:
    """Names in a directory, sorted.

    Raises:
        AdapterInvalidError: More than MAX_DIRECTORY_ENTRIES.
    """
    names: list[str] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) > MAX_DIRECTORY_ENTRIES:
                raise AdapterInvalidError(f"the adapter's directory has more than {MAX_DIRECTORY_ENTRIES} entries")
    return sorted(names)


def refuse_code(directory: Path) -> None:
    """Refuse an adapter that comes with program code, before any of its files is opened.

    Raises:
        AdapterInvalidError: adapter_code_refused.
    """
    _refuse_scripts(listed(directory))


def _refuse_scripts(names: Iterable[str]) -> None:
    script = next((name for name in names if name.endswith(".py")), None)
    if script is not None:
        raise AdapterInvalidError(
            f"the adapter holds program code ({script[:80]!a}); an adapter is data only, remove it", code="adapter_code_refused"
        )


def _one_gguf(names: list[str]) -> str | None:
    files = [name for name in names if name.endswith(GGUF_ENDING)]
    if len(files) > 1:
        shown = ", ".join(f"{name[:60]!a}" for name in files[:3])
        raise AdapterInvalidError(
            f"the adapter has {len(files)} GGUF files ({shown}); leave the one to serve", code="adapter_format_unsupported"
        )
    return files[0] if files else None


def _no_weights(names: Iterable[str]) -> AdapterInvalidError:
    pickle = next((name for name in names if name.endswith(PICKLE_ENDINGS)), None)
    found = "" if pickle is None else f" (it has {pickle[:80]!a})"
    return AdapterInvalidError(
        f"only safetensors and GGUF adapters are accepted: {WEIGHTS_FILE} is missing{found}; save it with"
        " safe_serialization=True",
        code="adapter_format_unsupported",
    )


def _is_inside(directory: Path, part: str) -> bool:
    """Whether every step of `part` is a real directory: a link could lead out of the adapter's own."""
    for step in part.split("/"):
        directory = directory / step
        try:
            if not stat.S_ISDIR(os.lstat(directory).st_mode):
                return False
        except OSError:
            return False
    return True


def _inner(directory: Path, part: str) -> list[str]:
    return listed(directory / part) if _is_inside(directory, part) else []
