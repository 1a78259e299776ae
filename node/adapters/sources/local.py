"""Adapters in directories the operator named. A client may choose among them by name and can reach nothing else."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from node.adapters.entry import NameFilter, sees_all
from node.adapters.formats.layout import is_adapter
from node.adapters.names import AdapterName, parse_name
from node.errors import AdapterIdError

MAX_LISTED = 100_000


class LocalSource:
    """Finds adapter directories under fixed roots. Only looks up types and links; reads nothing.

    Args:
        roots: Directories that hold adapters as `name` or `owner/name`.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(Path(os.path.realpath(root)) for root in roots)
        self._spellings = tuple(dict.fromkeys((*(Path(os.path.abspath(root)) for root in roots), *self._roots)))

    def name_of(self, text: str, sees: NameFilter = sees_all) -> AdapterName | None:
        """The name of an absolute path below one of the roots, which is how users of other servers say it; None for other text.

        Raises:
            AdapterIdError: Not below a root, not spelled as a name there, nothing there, nothing that exists for the caller, or
                hidden by an earlier root. The answer is the same for all: it tells nobody what else is on the disk.
        """
        if not text.startswith("/"):
            return None
        for root in self._spellings:
            below = text.removeprefix(f"{root}/")
            if (
                below != text
                and (name := _as_name(below)) is not None
                and self.find(sought := sought_name(name, sees)) == Path(os.path.realpath(root / sought.path))
            ):
                return name
        raise AdapterIdError(
            f"adapter path {text[:96]!a} is no adapter directory below a root of this node; name it as it is named there",
            param="model",
        )

    def find(self, name: AdapterName) -> Path | None:
        """The adapter's directory with every link resolved, or None.

        A link may lead to another place under the same root. One that leads out of it, and anything that is no directory (a file,
        a FIFO, a device), is as good as absent: saying more would tell a stranger what else is on the disk.
        """
        for root in self._roots:
            found = _real_directory(f"{root}/{name.path}")
            if found is not None and found.startswith(f"{root}/".replace("//", "/")):
                return Path(found)
        return None

    def listed(self) -> list[str]:
        """Names of the directories directly under the first root that hold an adapter, sorted."""
        if not self._roots or not _is_directory(self._roots[0]):
            return []
        names: list[str] = []
        with os.scandir(self._roots[0]) as entries:
            for entry in entries:
                if len(names) < MAX_LISTED and is_adapter(Path(entry.path)):
                    names.append(entry.name)
        return sorted(names)


def sought_name(name: AdapterName, sees: NameFilter) -> AdapterName:
    """The name to look for. In place of one that does not exist for the caller: one beside it, as long, that breaks the grammar
    of names and so is no adapter's. The file system is asked the same as for a name nobody registered."""
    absent = f"{name.path[:-1]}\x01"  # made for every name: that takes time, too
    return AdapterName(name.path if sees(name.path) else absent, name.revision)


def _as_name(text: str) -> AdapterName | None:
    try:
        name = parse_name(text.rstrip("/"))
    except AdapterIdError:
        return None
    return name if name.revision is None else None


def _real_directory(path: str) -> str | None:
    """A directory's path with every link resolved, by the kernel: three calls, and one where nothing is there."""
    try:
        handle = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # opens no file: a FIFO or device is not touched
    except OSError:
        return None
    try:
        return os.readlink(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


def _is_directory(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False
