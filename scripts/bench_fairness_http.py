#!/usr/bin/env python3
"""What a tenant with a hundred times the load does to another tenant's time to first token, over HTTP, with the real engine.

    python scripts/bench_fairness_http.py --shape llama-3.1-8b --random-weights --engine-cores 0-9 --client-cores 10-15

alone    tenant B's clients on a node with B's share of everything: half the sequences, rows a step and KV blocks. A machine half
         as fast cannot be had, so `ratio` compares with twice what this node needs, as `bench_fairness.py` counts every step
         twice, and `ratio_whole` with what it needs on the whole machine;
beside   the same clients on the whole node, beside tenant A with --load times as many clients. Weights are equal.

Both nodes are up all the while and one is asked, --pairs times in turns. A client streams an answer of --tokens to a prompt of
random length, thinks for a moment, and sends another. Both nodes have keys; A and B are processes of their own. One line of JSON:
p50 and p99 in milliseconds over all pairs, and the ratios with bootstrap intervals (pairs are drawn, and requests within them).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from bench_adapter_sources import client_cores, node, prepare
from storm_figures import bootstrap
from storm_load import Helper

KEYS = {"a": "tenant-a-has-this-key", "b": "tenant-b-has-this-key"}
CROWD_STAYS_S = 1.0  # after the last of B's requests was sent
SHARE = 2  # B's part of the engine is one in so many


class Side:
    """A node with a part of everything, and the clients that ask it."""

    def __init__(self, stack: ExitStack, args: argparse.Namespace, scratch: Path, model: str, *, share: int, load: int) -> None:
        place = scratch / f"node-{share}"
        (place / "none").mkdir(parents=True)
        keys = place / "api-keys"
        keys.touch(0o600)
        keys.write_text("".join(f"{tenant} {key}\n" for tenant, key in KEYS.items()))
        settings = (
            f'memory_bytes = "512MiB"\nhost_memory_bytes = "512MiB"\n[engine]\nprefix_cache = false\n'
            f"max_sequences = {args.sequences // share}\nmax_batch_tokens = {args.rows // share}\n"
            f'kv_cache_bytes = "{args.kv_mib // share}MiB"\n'
        )
        server = f'api_keys_file = "{keys}"\nmax_connections_per_address = 4096'
        url, _ = stack.enter_context(node(place, model, place / "none", args, settings, server))
        host, cores = url.removeprefix("http://"), client_cores(args.client_cores)
        self._clients = stack.enter_context(closing(Helper(cores[0], "tenant", host, KEYS["b"], "", str(args.clients))))
        self._crowd: Helper | None = None
        if load:
            self._crowd = stack.enter_context(closing(Helper(cores[1], "tenant", host, KEYS["a"], "", str(load * args.clients))))
        self._line = {"tokens": args.tokens, "prompt": list(args.prompt), "think_s": args.think_s, "warm_up_s": args.warm_up_s}

    def measure(self, seconds: float, seed: int) -> list[float]:
        """B's times to first token in seconds."""
        if self._crowd is not None:
            self._crowd.tell(seconds=seconds + CROWD_STAYS_S, seed=1000 + seed, hangs_up=True, **self._line)
        found: list[float] = self._clients.ask(seconds=seconds, seed=seed, **self._line)["ttft_s"]
        if self._crowd is not None:
            self._crowd.hear()
        return found


def measured(args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """B's times to first token of every pair, alone and beside."""
    found: tuple[list[Any], list[Any]] = ([], [])
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.files) as scratch, ExitStack() as stack:
        model, _ = prepare(args, args.prepared or Path(scratch))
        with ThreadPoolExecutor(2) as threads:
            starts = [
                threads.submit(Side, stack, args, Path(scratch), model, share=share, load=load)
                for share, load in ((SHARE, 0), (1, args.load))
            ]
        sides = [start.result() for start in starts]
        for index in range(args.pairs):
            for place in (0, 1) if index % 2 == 0 else (1, 0):
                found[place].append(np.asarray(sides[place].measure(args.seconds, 100 * index)))
            p99 = [1000 * float(np.quantile(side[-1], 0.99)) for side in found]
            print(json.dumps({"pair": index + 1, "since_start_s": time.monotonic() - begun_s, "ttft_p99_ms": p99}), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="", help="random weights of a shape (scripts/random_model.py) instead of the package")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--random-weights", action="store_true", help="weights of --shape made where they run, not read")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--kv-mib", type=int, default=1024)
    parser.add_argument("--clients", type=int, default=4, help="of tenant B")
    parser.add_argument("--load", type=int, default=100, help="clients of tenant A for each of B's")
    parser.add_argument("--prompt", type=int, nargs=2, default=(32, 96), metavar=("LEAST", "MOST"))
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--think-s", type=float, default=0.05, help="mean pause of a client")
    parser.add_argument("--seconds", type=float, default=15.0, help="each side of a pair")
    parser.add_argument("--warm-up-s", type=float, default=3.0, help="requests sent before are left out")
    parser.add_argument("--engine-cores", default="", help="cores of the node, as taskset takes them")
    parser.add_argument("--client-cores", default="", help="cores of the clients")
    parser.add_argument("--prepared", type=Path, help="a directory for the shape's files, which are made once")
    parser.add_argument("--files", type=Path, help="where files are made; default: the temporary directory")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    alone, beside = measured(args)
    given = {key: value for key, value in vars(args).items() if key not in ("out", "files", "prepared")}
    row: dict[str, Any] = {"row": "fairness-http", **given, "counted": [sum(map(len, side)) for side in (alone, beside)]}
    for percent in (50, 99):
        sides = [1000 * float(np.quantile(np.concatenate(side), percent / 100)) for side in (alone, beside)]
        ((low, high),) = bootstrap(alone, beside, [percent / 100])
        row[f"ttft_p{percent}_ms"] = [round(side, 2) for side in sides]
        row[f"ratio_whole_p{percent}"] = [round(sides[1] / sides[0], 3), low, high]
        row[f"ratio_p{percent}"] = [round(value / SHARE, 3) for value in (sides[1] / sides[0], low, high)]
    row["ratio_p99_by_pair"] = [
        round(float(np.quantile(late, 0.99) / np.quantile(early, 0.99)) / SHARE, 3)
        for early, late in zip(alone, beside, strict=True)
    ]
    row |= {"cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    print(json.dumps(row))
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
