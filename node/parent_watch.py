"""A process that its parent keeps alive by keeping its standard input open: when that ends, so does the process."""

from __future__ import annotations

import os
import sys
import threading

EXIT_ORPHANED = 4


def watch_parent() -> None:
    """Begin to wait for the end of standard input, from which nothing is expected any more."""
    threading.Thread(target=_exit_with_parent, name="parent-watch", daemon=True).start()


def _exit_with_parent() -> None:
    """No clean-up: nobody is left to hear of it, and nothing that these processes have is durable."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(EXIT_ORPHANED)
