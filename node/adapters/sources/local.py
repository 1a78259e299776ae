"""Adapters in directories the operator named. A client may choose among them by name and can reach nothing else."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from node.adapters.formats.layout import is_adapter
from node.adapters.names import AdapterName

MAX_LISTED = 100_000


class LocalSource:
    """Finds adapter directories under fixed roots. Only looks up types and links; opens nothing.

    Args:
        roots: Directories that hold adapters as `name` or `owner/name`.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(Path(os.path.realpath(root)) for root in roots)

    def find(self, name: AdapterName) -> Path | None:
        """The adapter's directory with every link resolved, or None.

        A link may lead to another place under the same root. One that leads out of it, and anything that is no directory (a file,
        a FIFO, a device), is as good as absent: saying more would tell a stranger what else is on the disk.
        """
        for root in self._roots:
            found = Path(os.path.realpath(root / name.path))
            if found != root and found.is_relative_to(root) and _is_directory(found):
                return found
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


def _is_directory(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False
