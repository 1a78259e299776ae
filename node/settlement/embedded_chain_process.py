"""The parent's handle on the development chain's process."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from node.child_process import child_environment
from node.errors import ChainError


@dataclass(frozen=True, slots=True)
class EmbeddedChainReady:
    """What the chain says once it answers requests."""

    rpc_url: str
    chain_id: int
    genesis_hash: str


class EmbeddedChainProcess:
    """Starts, watches and ends one chain process. Blocking: call it off the event loop.

    Args:
        directory: The chain's directory, `<data_dir>/chain`.
        fund: Addresses with gas money in the genesis of a new chain; an existing chain ignores them.
        port: Loopback port; 0 takes any free one and keeps it over later starts.
        start_timeout_s: How long starting and replaying may take.
    """

    def __init__(self, directory: Path, fund: Sequence[str] = (), port: int = 0, start_timeout_s: float = 120.0) -> None:
        self._directory, self._fund, self._port, self._start_timeout_s = directory, tuple(fund), port, start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process_id(self) -> int | None:
        """The child's process id while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> EmbeddedChainReady:
        """Start the chain and wait until it answers.

        Raises:
            ChainError: chain_locked, chain_corrupt, or chain_unreachable when it does not come up in time.
        """
        # -P: never import from the directory the node happens to be started in.
        command = [sys.executable, "-P", "-m", "node.settlement.embedded_chain", "--data-dir", str(self._directory)]
        command += ["--port", str(self._port)]
        for address in self._fund:
            command += ["--fund", address]
        self._process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(),
            start_new_session=True,  # Ctrl-C goes to the parent alone, whose last transactions still need the chain
        )
        try:
            ready = self._ready(self._first_line(self._process))
            self._port = int(ready.rpc_url.rpartition(":")[2])
            return ready
        except ChainError:
            self.close()
            raise

    def close(self, timeout_s: float = 10.0) -> None:
        """End the chain and wait for it. Blocks are already on the disk, so nothing is lost when it must be killed."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def _first_line(self, process: subprocess.Popen[bytes]) -> bytes:
        if process.stdout is None:
            raise ChainError("the development chain was started without an output pipe")
        readable, _, _ = select.select([process.stdout], [], [], self._start_timeout_s)
        line = process.stdout.readline(65536) if readable else b""
        if not line:
            raise ChainError(
                f"the development chain in {self._directory} did not start within {self._start_timeout_s:g} s; "
                "its own lines on stderr say why"
            )
        return line

    def _ready(self, line: bytes) -> EmbeddedChainReady:
        try:
            fields = json.loads(line)
            if "code" in fields:
                raise ChainError(str(fields["message"]), code=str(fields["code"]))
            return EmbeddedChainReady(
                f"http://127.0.0.1:{int(fields['port'])}", int(fields["chain_id"]), str(fields["genesis_hash"])
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ChainError(
                "the development chain announced itself with an unreadable line; install this version again"
            ) from error
