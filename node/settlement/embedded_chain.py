"""The development chain as a program: `python -m node.settlement.embedded_chain --data-dir DIR`.

One process, one thread for the chain, JSON-RPC over HTTP on loopback. It holds no keys. It is not a settlement layer: nobody else
keeps a copy of it. It announces itself with one JSON line on stdout and ends when its stdin closes, which happens when its parent
is gone, however that died.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from aiohttp import web

from node.errors import ChainError
from node.settlement.embedded_chain_evm import Evm, TransactionRefused
from node.settlement.embedded_chain_log import BlockLog, LoggedBlock
from node.settlement.embedded_chain_rpc import ChainRpc, RpcError
from node.settlement.genesis import EMBEDDED_CHAIN_ID, GAS_MONEY_WEI, Genesis
from node.settlement.json_bounds import loads_bounded

MAX_BODY_BYTES = 1 << 20
LOG_NAME = "blocks.log"
LOCK_NAME = "lock"
EXIT_FAILED = 1

logger = logging.getLogger(__name__)


def open_chain(log: BlockLog, new_genesis: Callable[[], Genesis]) -> Evm:
    """Replay a log into a chain; an empty log first gets a genesis.

    Raises:
        ChainError: chain_corrupt, the log is damaged or its blocks do not come out with their recorded hashes.
    """
    payloads = log.read()
    if not payloads:
        genesis = new_genesis()
        log.append(genesis.to_bytes())
        return Evm(genesis)
    evm = Evm(Genesis.from_bytes(payloads[0]))
    for number, payload in enumerate(payloads[1:], start=1):
        logged = LoggedBlock.from_bytes(payload)
        try:
            block_hash = evm.mine(logged.raw, logged.timestamp_s).hash
        except TransactionRefused as refused:
            raise _other_rules(number) from refused
        if block_hash != logged.block_hash:
            raise _other_rules(number)
    return evm


def _other_rules(number: int) -> ChainError:
    return ChainError(
        f"block {number} of the development chain does not replay to its recorded hash: its log follows other EVM rules; "
        "install the version that wrote it, or remove the chain's directory to start a new chain",
        code="chain_corrupt",
    )


def take_lock(directory: Path, wait_s: float, clock_s: Callable[[], float], pause: Callable[[float], None]) -> int:
    """Hold the directory for this process; the kernel lets go when the process ends.

    Args:
        directory: The chain's directory.
        wait_s: How long a predecessor that is just ending may take.
        clock_s: Monotonic clock.
        pause: Waits between two tries.

    Raises:
        ChainError: chain_locked, another process has it.
    """
    fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline_s = clock_s() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if clock_s() >= deadline_s:
                os.close(fd)
                raise ChainError(
                    f"another process runs the development chain in {directory}; stop it or choose another --data-dir",
                    code="chain_locked",
                ) from error
            pause(0.05)
        else:
            return fd


def application(rpc: ChainRpc, on_broken: Callable[[], None]) -> web.Application:
    """One POST route. `on_broken` is told when a block could not be written: nothing may be answered after that."""

    async def handle(request: web.Request) -> web.Response:
        if request.content_type != "application/json":  # a web page cannot send this type to another origin unasked
            raise web.HTTPUnsupportedMediaType
        try:
            body = loads_bounded(await request.read())
            method, params = body["method"], body.get("params") or []
            request_id = body.get("id")
            if not isinstance(method, str) or not isinstance(params, list):
                raise TypeError(method)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return web.json_response(_failure(None, -32600, "invalid request"))
        try:
            return web.json_response({"jsonrpc": "2.0", "id": request_id, "result": rpc.answer(method, params)})
        except RpcError as error:
            return web.json_response(_failure(request_id, error.code, error.message, error.data))
        except ChainError as error:
            logger.error("%s", error.message)
            on_broken()
            raise web.HTTPInternalServerError from error

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_post("/", handle)
    return app


def _failure(request_id: object, code: int, message: str, data: str | None = None) -> dict[str, object]:
    error: dict[str, object] = {"code": code, "message": message}
    if data is not None:
        error["data"] = data
    return {"jsonrpc": "2.0", "id": request_id, "error": error}


async def serve(evm: Evm, log: BlockLog, port: int) -> int:
    """Answer on loopback until stdin closes; returns the exit code."""
    stopped = asyncio.Event()
    broken = asyncio.Event()

    def on_broken() -> None:
        broken.set()
        stopped.set()

    rpc = ChainRpc(evm, log, lambda: int(time.time()))
    runner = web.AppRunner(application(rpc, on_broken), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    address = runner.addresses[0]
    genesis = evm.block_by_number(0)
    announcement = {"port": address[1], "chain_id": evm.chain_id, "genesis_hash": "0x" + genesis.hash.hex() if genesis else ""}
    sys.stdout.write(json.dumps(announcement) + "\n")
    sys.stdout.flush()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), lambda: _watch_stdin(stopped))
    try:
        await stopped.wait()
    finally:
        await runner.cleanup()
    return EXIT_FAILED if broken.is_set() else 0


def _watch_stdin(stopped: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        stopped.set()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chain; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m node.settlement.embedded_chain", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="directory of the chain's log")
    parser.add_argument("--port", type=int, default=0, help="loopback port; 0: any free one, announced on stdout")
    parser.add_argument(
        "--fund", action="append", default=[], metavar="ADDRESS", help="has gas money in the genesis of a new chain"
    )
    parser.add_argument("--lock-wait-s", type=float, default=5.0, help="how long to wait for a predecessor to end")
    options = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s %(message)s", level=logging.INFO)
    try:
        return _run(options)
    except ChainError as error:
        sys.stdout.write(json.dumps({"code": error.error_code, "message": error.message}) + "\n")
        sys.stdout.flush()
        return EXIT_FAILED


def _run(options: argparse.Namespace) -> int:
    options.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = take_lock(options.data_dir, options.lock_wait_s, time.monotonic, time.sleep)
    log = BlockLog(options.data_dir / LOG_NAME)
    try:
        evm = open_chain(log, lambda: _new_genesis(options.fund))
        return asyncio.run(serve(evm, log, options.port))
    except OSError as error:
        raise ChainError(
            f"the development chain cannot listen on 127.0.0.1:{options.port} or cannot read {options.data_dir}; "
            "choose another port or directory",
            code="chain_unreachable",
        ) from error
    finally:
        log.close()
        os.close(lock)


def _new_genesis(funded: Sequence[str]) -> Genesis:
    return Genesis(EMBEDDED_CHAIN_ID, int(time.time()), {address.lower(): GAS_MONEY_WEI for address in funded})


if __name__ == "__main__":
    sys.exit(main())
