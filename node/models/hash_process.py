"""The process that hashes a large base model: `python -m node.models.hash_process`, started by `node.models.base_identity`.

Standard input brings one line, a JSON object of names and paths, and stays open: when it ends, the parent is gone and so is this
process. The hash goes to standard output, 64 hex digits. Hashing asks for the interpreter lock a hundred thousand times, which in
a process that imports or compiles meanwhile would take minutes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from attribution import identity
from attribution.errors import IdentityError
from node.parent_watch import watch_parent

EXIT_UNREADABLE = 3
NICENESS = 5  # the process that starts meanwhile comes first
MOST_THREADS = 16


def main() -> int:
    """Answer once; returns the exit status."""
    named = {name: Path(path) for name, path in json.loads(sys.stdin.buffer.readline()).items()}
    watch_parent()
    os.nice(NICENESS)
    try:
        found = identity.base_id(named, threads=min(os.cpu_count() or 1, MOST_THREADS))
    except (OSError, IdentityError):
        return EXIT_UNREADABLE
    sys.stdout.write(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
