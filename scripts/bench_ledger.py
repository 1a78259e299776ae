#!/usr/bin/env python3
"""Measure the ledger alone: how long an admission and a record take, and what they cost the two processes they pass through.

    scripts/bench_ledger.py --requests 256 --wave 32 --every-ms 9 --rounds 8 --directory /dev/shm

Waves of requests are admitted and closed as a crowd in a closed loop is: `--wave` of them end in one step, the next in the step
after it, `--every-ms` later. No engine, no HTTP. A JSON line with medians over the rounds: milliseconds from a call to its answer
(`admit_*_ms`, `close_*_ms`; `close_last_ms`: until the last of a wave has its receipt and has written the end of its answer), and
microseconds of processor time a request, of this process (`caller_us`) and of the ledger's (`ledger_us`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from bench_report import commit

from attribution.fees import Contribution, Payees, Price, SplitPolicy
from attribution.record import RecipeTerm
from node.settlement.admission import Admission, Outcome
from node.settlement.keys import KeyDirectory
from node.settlement.ledger import Ledger

CHAIN_ID = 31337
MAKER, TRAINER = "0x" + "11" * 20, "0x" + "22" * 20


class Crowd:
    """Requests of one tenant, to as many adapters as are asked for, in turn."""

    def __init__(self, args: argparse.Namespace, ledger: Ledger) -> None:
        self._args = args
        self._ledger = ledger
        random = np.random.default_rng(0)
        self._prompt = tuple(random.integers(10, 128_000, args.prompt_tokens).tolist())
        self._output = tuple(random.integers(10, 128_000, args.new_tokens).tolist())
        self._adapters = [f"{index + 1:064x}" for index in range(args.adapters)]

    async def admit(self, index: int, request_id: str) -> float:
        """Milliseconds until the admission is durable."""
        admission = self._admission(index, request_id)
        begun_s = time.perf_counter()
        await self._ledger.admit(admission)
        return 1e3 * (time.perf_counter() - begun_s)

    async def close(self, request_id: str) -> float:
        """Milliseconds until the record is durable, its receipt is here, and the answer's end is written."""
        outcome = Outcome(request_id=request_id, status="ok", finish_reason="length", outputs=(self._output,))
        begun_s = time.perf_counter()
        await self._ledger.close(outcome)
        _compute(self._args.answer_us)
        return 1e3 * (time.perf_counter() - begun_s)

    def _admission(self, index: int, request_id: str) -> Admission:
        terms: tuple[RecipeTerm, ...] = ()
        made: tuple[Contribution, ...] = ()
        if self._adapters:
            name = self._adapters[index % len(self._adapters)]
            terms = (RecipeTerm(name, "c" * 64 if self._args.manifests else None, "1"),)
            made = (Contribution(name, TRAINER, ((MAKER, 1_000_000),)),) if self._args.manifests else ()
        return Admission(
            request_id=request_id,
            tenant="bench",
            base_id="b" * 64,
            prompts=(self._prompt,),
            terms=terms,
            contributions=made,
            price=Price("1000000000", "3000000000"),
            policy=SplitPolicy(500_000, 200_000, 300_000),
            payees=Payees(self._ledger.operator, self._ledger.operator),
        )


async def one_round(args: argparse.Namespace, crowd: Crowd, child: int) -> dict[str, float]:
    """Every request once."""
    ids = [secrets.token_hex(16) for _ in range(args.requests)]
    waves = [ids[first : first + args.wave] for first in range(0, args.requests, args.wave)]
    before_s, child_s = time.process_time(), _cpu_s(child)
    admitted = await _in_waves([[crowd.admit(i, name) for i, name in enumerate(wave)] for wave in waves], args.every_ms)
    closed = await _in_waves([[crowd.close(name) for name in wave] for wave in waves], args.every_ms)
    spent_s, child_spent_s = time.process_time() - before_s, _cpu_s(child) - child_s
    return {
        "admit_p50_ms": float(np.median(np.concatenate(admitted))),
        "admit_p99_ms": float(np.percentile(np.concatenate(admitted), 99)),
        "close_p50_ms": float(np.median(np.concatenate(closed))),
        "close_p99_ms": float(np.percentile(np.concatenate(closed), 99)),
        "close_last_ms": statistics.median(max(wave) for wave in closed),
        "caller_us": 1e6 * spent_s / args.requests,
        "ledger_us": 1e6 * child_spent_s / args.requests,
    }


def _compute(microseconds: float) -> None:
    until_ns = time.thread_time_ns() + 1000 * microseconds
    while time.thread_time_ns() < until_ns:
        pass


async def _in_waves(waves: Sequence[Sequence[Any]], every_ms: float) -> list[list[float]]:
    running = []
    begun_s = time.perf_counter()
    for index, wave in enumerate(waves):
        await asyncio.sleep(max(0.0, begun_s + index * every_ms / 1e3 - time.perf_counter()))
        running.append(asyncio.gather(*wave))
    return list(await asyncio.gather(*running))


def _cpu_s(pid: int) -> float:
    """Processor time of a process, all its threads, finer than the ticks of /proc/PID/stat."""
    fields = [Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0] for task in os.listdir(f"/proc/{pid}/task")]
    return sum(map(int, fields)) / 1e9


async def run(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Median of the rounds, after one to warm up."""
    keys = KeyDirectory(directory / "keys", scrypt_n=2)
    keys.open()
    ledger = Ledger(
        f"sqlite:///{directory / 'ledger.sqlite'}",
        clock_ms=lambda: time.time_ns() // 10**6,
        signer=keys.load("operator"),
        chain_id=CHAIN_ID,
        group_commit_ms=args.group_commit_ms,
        keys_dir=directory / "keys",
    )
    await ledger.open()
    crowd = Crowd(args, ledger)
    child = _child()
    rounds = [await one_round(args, crowd, child) for _ in range(args.rounds + 1)][1:]
    await ledger.shutdown()
    return {key: round(statistics.median(item[key] for item in rounds), 3) for key in rounds[0]}


def _child() -> int:
    """The ledger's process: the only one this one has started."""
    pid = os.getpid()
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    if len(found) != 1:
        raise SystemExit(f"{len(found)} child processes run where one should")
    return int(found[0])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256, help="in a round")
    parser.add_argument("--wave", type=int, default=32, help="of them at once")
    parser.add_argument("--every-ms", type=float, default=9.0, help="between two waves")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=64, help="0: the base model alone")
    parser.add_argument("--manifests", action="store_true", help="each with a trainer and a contributor")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--group-commit-ms", type=float, default=2.0)
    parser.add_argument("--answer-us", type=float, default=0.0, help="of this process for the end of an answer")
    parser.add_argument("--directory", type=Path, help="where the ledger's file goes; default: a temporary directory")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="ledger", dir=args.directory) as directory:
        measured = uvloop.run(run(args, Path(directory)))
    told = {key: value for key, value in vars(args).items() if key not in ("out", "directory")}
    row = {"row": "ledger", **told, **measured, "cores": os.cpu_count(), "python": platform.python_version(), "commit": commit()}
    print(json.dumps(row))
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
