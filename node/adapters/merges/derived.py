"""Derived adapters: made once for each recipe, kept in the adapter cache under the recipe's hash, verified like any other.

Lives on the API process's event loop. Making one runs in a process of its own, within time and memory; a second request for the
same recipe waits for the first one's.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from node.adapters.disk_cache import DiskCache
from node.adapters.flights import Flights
from node.adapters.merges.recipe import MergeRecipe
from node.adapters.verify import VerifiedAdapter
from node.errors import AdapterError, AdapterInvalidError, AdapterUnavailableError, error_from_json
from node.request import LinearShape

Verify = Callable[[Path], Awaitable[VerifiedAdapter]]

MAX_WAITING = 16  # recipes under way; one more is refused
MAX_OUTPUT_BYTES = 1 << 16
VERIFY_S = 10.0
SOURCE = "merged"  # the derived adapters' directory inside the adapter cache


class Deriver:
    """Makes and remembers derived adapters. Belongs to one event loop.

    Args:
        cache: Of adapters; bounds derived ones together with everything fetched.
        verify: Checks a directory against the base, off the event loop.
        linears: The base's linear modules.
        max_rank: Limit on ranks. max_bytes: limit on an adapter's file.
        memory_bytes: Address space of the process that merges.
        timeout_s: How long making one may take.
    """

    def __init__(
        self,
        cache: DiskCache,
        verify: Verify,
        linears: Sequence[LinearShape],
        *,
        max_rank: int,
        max_bytes: int,
        memory_bytes: int,
        timeout_s: float,
    ) -> None:
        self._cache = cache
        self._verify = verify
        self._linears = [msgspec.to_builtins(linear) for linear in linears]
        self._max_rank = max_rank
        self._max_bytes = max_bytes
        self._memory_bytes = memory_bytes
        self._timeout_s = timeout_s
        # A caller also waits for the merge before its own, and for the hashing of what was made.
        self._flights = Flights(limit=MAX_WAITING, timeout_s=2 * timeout_s + VERIFY_S)
        self._turn = asyncio.Lock()  # one merge at a time: it takes a core from whoever serves

    async def derive(self, recipe: MergeRecipe) -> VerifiedAdapter:
        """The derived adapter of a recipe, made now where it is not in the cache.

        Raises:
            AdapterError: A source cannot be merged or changed meanwhile; limits of time, memory or space.
        """
        directory = self._place(recipe)
        self._cache.touch(directory)
        return await self._flights.join(directory, lambda: self._derive(recipe, directory))

    async def close(self) -> None:
        """End what is being made."""
        await self._flights.close()

    def _place(self, recipe: MergeRecipe) -> Path:
        name = recipe.recipe_hash()
        return self._cache.place(SOURCE, name[:2], name)

    async def _derive(self, recipe: MergeRecipe, directory: Path) -> VerifiedAdapter:
        if not directory.is_dir():
            async with self._turn:
                await self._make(recipe, directory)
            self._cache.touch(directory)
        return await self._verify(directory)

    async def _make(self, recipe: MergeRecipe, directory: Path) -> None:
        """Fill a directory beside the final one and show it complete, so that a crash leaves half a merge to nobody."""
        try:
            await asyncio.to_thread(self._cache.make_room, await self._largest_bytes(recipe))
            directory.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=".merging-", dir=directory.parent))
        except OSError as error:
            raise AdapterUnavailableError(
                f"the merged adapter cannot be stored (errno {error.errno}); check the adapter cache",
                code="cache_full",
                retry_after_s=60.0,
            ) from error
        try:
            await self._run(recipe, scratch)
            os.replace(scratch, directory)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    async def _largest_bytes(self, recipe: MergeRecipe) -> int:
        """A bound on the result: it has the modules of all sources at the largest rank, in float32."""
        verified = [await self._verify(source.directory) for source in recipe.sources]
        rank = max(item.rank for item in verified)
        modules = {(part.module, part.adapted_count) for item in verified for part in item.coverage}
        kinds = {values["name"]: values["in_features"] + values["out_features"] for values in self._linears}
        return sum(4 * rank * kinds[name] * count for name, count in modules if name in kinds)

    async def _run(self, recipe: MergeRecipe, target: Path) -> None:
        job = {
            "recipe": recipe.to_json(),
            "target": str(target),
            "linears": self._linears,
            "max_rank": self._max_rank,
            "max_bytes": self._max_bytes,
            "memory_bytes": self._memory_bytes,
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "node.adapters.merges.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            limit=MAX_OUTPUT_BYTES,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(json.dumps(job).encode()), self._timeout_s)
        except TimeoutError as error:
            raise AdapterUnavailableError(
                f"merging took longer than {self._timeout_s:g} s (adapters.merge_timeout_s); merge fewer or smaller adapters",
                code="source_limit",
                retry_after_s=self._timeout_s,
            ) from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        _raise_outcome(output, process.returncode)


def _raise_outcome(output: bytes, status: int | None) -> None:
    """Raise what the process said; an end without a word is the memory limit or a signal."""
    try:
        error = json.loads(output)["error"]
    except (ValueError, KeyError, TypeError) as fault:
        raise AdapterInvalidError(
            f"the process that merges ended with status {status} and no result; raise adapters.merge_memory_bytes or merge fewer"
            " adapters",
            code="adapter_too_large",
        ) from fault
    if error is not None:
        raised = error_from_json(error)
        raise raised if isinstance(raised, AdapterError) else AdapterInvalidError(raised.message)
