"""The process that makes one derived adapter: a job as JSON on standard input, its outcome as JSON on standard output.

A process of its own, because numpy holds the interpreter lock for much of this, because its memory can be bounded, and because it
can be ended when it takes too long. It imports no torch.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from node.adapters.linear_table import LinearTable
from node.adapters.merges.build import build
from node.adapters.merges.recipe import MergeRecipe
from node.errors import AdapterInvalidError, AdapterUnavailableError, NodeError
from node.request import LinearShape

NICENESS = 10  # whoever decodes now comes first


def run(job: dict[str, Any]) -> None:
    """Do one job; see `derived.Deriver`.

    Raises:
        AdapterError: Why there is no derived adapter.
    """
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (job["memory_bytes"], job["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    table = LinearTable([LinearShape(**values) for values in job["linears"]])
    try:
        build(
            MergeRecipe.from_json(job["recipe"]),
            Path(job["target"]),
            table,
            max_rank=job["max_rank"],
            max_bytes=job["max_bytes"],
        )
    except MemoryError as error:
        raise AdapterInvalidError(
            f"merging these adapters takes more than {job['memory_bytes']} bytes of memory; raise adapters.merge_memory_bytes",
            code="adapter_too_large",
        ) from error
    except OSError as error:
        raise AdapterUnavailableError(
            f"the merged adapter cannot be written (errno {error.errno}); free space in the adapter cache",
            code="cache_full",
            retry_after_s=60.0,
        ) from error


def main() -> int:
    """Read a job, do it, say what came of it."""
    try:
        run(json.load(sys.stdin))
    except NodeError as error:
        json.dump({"error": error.to_json()}, sys.stdout)
        return 1
    json.dump({"error": None}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
