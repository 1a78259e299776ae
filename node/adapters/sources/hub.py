"""Adapters from the Hugging Face hub: three files of one commit, nothing else, staged as plain files under its hash.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE` and the rest mean what the library's documentation says. Downloads go
through its cache; the node serves from its own directory, where a verified file cannot be a link to something that moves.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import OfflineModeIsEnabled

from node.adapters.names import AdapterName
from node.adapters.sources.hub_errors import from_hub, translated
from node.adapters.verify import ADAPTER_FILES, WEIGHTS_FILE, refuse_names
from node.errors import AdapterForbiddenError, AdapterInvalidError, AdapterNotFoundError, AdapterUnavailableError

SMALL_FILE_BYTES = 1 << 20  # configuration and manifest
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubCommit:
    """What a name stands for on the hub now. `is_private` covers gated repositories: both are shown only to some tokens."""

    commit: str
    is_private: bool
    file_names: tuple[str, ...] = ()
    sizes: tuple[int | None, ...] = ()


class _Reference(msgspec.Struct, frozen=True):
    """The last answer of the hub about one name, kept for offline starts."""

    commit: str
    is_private: bool


class HubSource:
    """Fetches adapters. Every method blocks: call them on a worker thread.

    Args:
        directory: Where staged adapters are kept: <directory>/<owner>--<name>/<commit>.
        max_bytes: Limit on the weights file.
        timeout_s: Limit on one answer about a repository; a download is bounded by the library's own HF_HUB_DOWNLOAD_TIMEOUT.
        endpoint: The hub's address; None: HF_ENDPOINT, else the public hub.
    """

    def __init__(self, directory: Path, *, max_bytes: int, timeout_s: float, endpoint: str | None = None) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._endpoint = endpoint
        self._api = HfApi(endpoint=endpoint)

    def look_up(self, name: AdapterName, token: str | None) -> HubCommit:
        """Ask the hub what `name` stands for, with the caller's right to see it.

        Args:
            name: With an owner; its revision is a branch, tag or commit, or None for the default branch.
            token: The client's own; None: the node's (HF_TOKEN), where it has one.

        Raises:
            AdapterForbiddenError: adapter_gated. AdapterNotFoundError. AdapterUnavailableError: 429, 5xx, no connection.
            AdapterInvalidError: The repository holds code or no safetensors weights, or files beyond their limits.
        """
        if not name.is_hub_id:
            raise AdapterNotFoundError(f"{name} is no hub adapter: those are named owner/name", param="model")
        with translated(name):
            try:
                info = self._api.model_info(
                    name.path, revision=name.revision, timeout=self._timeout_s, files_metadata=True, token=token
                )
            except OfflineModeIsEnabled as error:
                return self._look_up_offline(name, error)
        found = _commit_of(info, name)
        self._refuse_oversized(found)
        return found

    def fetch(self, name: AdapterName, found: HubCommit, token: str | None) -> Path:
        """Download and stage what `look_up` found; returns the staged directory.

        Raises:
            The errors of `look_up`, and AdapterUnavailableError (cache_full) where nothing can be written.
        """
        staged = self._staged(name, found.commit)
        with translated(name):
            if not (staged / WEIGHTS_FILE).is_file():
                self._stage(name, found, token, staged)
            self._remember(name, found)
        return staged

    def _stage(self, name: AdapterName, found: HubCommit, token: str | None, staged: Path) -> None:
        """All files appear under the final name at once, so that a crash never leaves half an adapter there."""
        staged.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".staging-", dir=staged.parent) as scratch:
            filling = Path(scratch) / "adapter"
            filling.mkdir()
            for file in (file for file in ADAPTER_FILES if file in found.file_names):
                cached = hf_hub_download(
                    name.path,
                    file,
                    revision=found.commit,
                    token=token,
                    endpoint=self._endpoint,
                    etag_timeout=self._timeout_s,
                )
                _place(Path(os.path.realpath(cached)), filling / file)
            try:
                filling.rename(staged)
            except OSError:
                if not (staged / WEIGHTS_FILE).is_file():  # else another thread was faster, with the same commit
                    raise

    def _refuse_oversized(self, found: HubCommit) -> None:
        for file, size in zip(found.file_names, found.sizes, strict=True):
            limit = self._max_bytes if file == WEIGHTS_FILE else SMALL_FILE_BYTES
            if file in ADAPTER_FILES and size is not None and size > limit:
                raise AdapterInvalidError(f"{file} has {size} bytes on the hub; the limit is {limit}", code="adapter_too_large")

    def _staged(self, name: AdapterName, commit: str) -> Path:
        return self._directory / name.path.replace("/", "--") / commit

    def _reference_file(self, name: AdapterName) -> Path:
        return self._directory / name.path.replace("/", "--") / f"ref-{name.revision or 'main'}.json"

    def _remember(self, name: AdapterName, found: HubCommit) -> None:
        content = msgspec.json.encode(_Reference(found.commit, found.is_private))
        file = self._reference_file(name)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".ref-", delete=False) as scratch:
            scratch.write(content)
        os.replace(scratch.name, file)

    def _look_up_offline(self, name: AdapterName, error: OfflineModeIsEnabled) -> HubCommit:
        """The last commit seen under this name. A private one stays closed: nobody can say who may read it."""
        try:
            known = msgspec.json.decode(self._reference_file(name).read_bytes(), type=_Reference)
        except (OSError, msgspec.MsgspecError):
            raise from_hub(error, name) from error
        staged = self._staged(name, known.commit)
        if not _COMMIT.fullmatch(known.commit) or not (staged / WEIGHTS_FILE).is_file():
            raise from_hub(error, name) from error
        if known.is_private:
            raise AdapterForbiddenError(
                f"{name} is private or gated, and offline nobody can check who may use it; go online", code="adapter_gated"
            ) from error
        return HubCommit(known.commit, known.is_private)


def _commit_of(info: Any, name: AdapterName) -> HubCommit:
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise AdapterUnavailableError(f"the hub names no commit for {name}", retry_after_s=60.0)
    files = list(info.siblings or ())
    names = [str(file.rfilename) for file in files]
    refuse_names(names)
    return HubCommit(info.sha, bool(info.private or info.gated), tuple(names), tuple(file.size for file in files))


def _place(cached: Path, target: Path) -> None:
    """A hard link where the cache is on the same file system: a commit's bytes never change, so sharing them is safe."""
    try:
        os.link(cached, target)
    except OSError:
        shutil.copyfile(cached, target)
