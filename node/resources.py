"""Files that travel with the code: in a wheel under `node/_data`, in the source tree at the top level."""

from __future__ import annotations

from pathlib import Path

_PACKAGED = Path(__file__).parent / "_data"
_SOURCE_TREE = Path(__file__).parent.parent


def data_path(name: str) -> Path:
    """The path of `name` ("config/demo/adapters", "csrc"), wherever this installation keeps it.

    Raises:
        FileNotFoundError: The installation is incomplete.
    """
    for root in (_PACKAGED, _SOURCE_TREE):
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(f"{name} is missing from this installation of openlora-node; install it again")
