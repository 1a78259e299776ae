#!/usr/bin/env python3
"""Measure what a tenant with a hundred times the load does to another tenant's time to first token.

    .venv/bin/python scripts/bench_fairness.py --out figures.jsonl
    .venv/bin/python scripts/bench_fairness.py --engine scheduler --step-cost 30

Both sides run the real engine (SmolLM2-135M) in this process, on the base model. With `--engine scheduler` they run its scheduler
alone, and a step costs as much as its rows and --step-cost more: the same on every machine, whatever else it does.

alone    tenant B's clients on an engine with B's share of everything: half the sequences, rows a step and KV blocks, on a machine
         half as fast (every step counts twice);
beside   the same clients on the whole engine, beside tenant A with --load times as many clients. Weights are equal.

A client sends a request of --prompt random tokens and 48 new ones, waits for its end, thinks for a moment, and sends another.
Time is the engine's own: `busy` is CPU seconds of its steps (or their cost), so that arrivals and waits do not depend on what
else this machine does. `wall` and `steps` count from the end of the step that a request arrived in. Requests that arrive while
the engine fills up (--warmup) are left out. One line of JSON: for every clock p50 and p99 of both sides, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node.adapters.residency import READY, Residency
from node.config import AdapterSettings, EngineSettings, ModelSettings
from node.engine.blocks import BlockPool
from node.engine.engine import Engine, open_engine
from node.engine.limits import SchedulerLimits
from node.engine.messages import SequenceEvent, Submit
from node.engine.scheduler import Scheduler
from node.engine.step_plan import WorkResult
from node.request import AdapterTerm, DrawnToken, Sampling

CLOCKS = ("steps", "busy", "wall")
NEW_TOKENS = 48
BLOCK_TOKENS = 16


class NoAdapters:
    """Adapter memory of sequences that use none."""

    def begin_step(self) -> None: ...

    def holds(self, terms: Sequence[AdapterTerm]) -> bool:
        return True

    def ensure(self, terms: Sequence[AdapterTerm]) -> Residency:
        return READY

    def pin(self, terms: Sequence[AdapterTerm]) -> None: ...

    def unpin(self, terms: Sequence[AdapterTerm]) -> None: ...


class SchedulerAlone:
    """An engine whose steps cost what their rows and `step_cost` say, and whose tokens are drawn at random."""

    def __init__(self, options: argparse.Namespace, share: int) -> None:
        blocks = BlockPool(options.kv_blocks // share, BLOCK_TOKENS, True)
        limits = SchedulerLimits(options.sequences // share, options.rows // share, 1 << 16, 4096, 1 << 15)
        self._scheduler = Scheduler(blocks, limits, NoAdapters(), "base")
        self._random = random.Random(options.seed)  # noqa: S311 - a workload
        self._step_cost = options.step_cost
        self.busy = 0.0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def add(self, submit: Submit) -> list[SequenceEvent]:
        refusal = self._scheduler.add(submit)
        return [] if refusal is None else [refusal]

    def step(self) -> list[SequenceEvent]:
        plan = self._scheduler.plan()
        self.busy += self._step_cost + plan.row_count
        results = [WorkResult(DrawnToken(self._random.randrange(1 << 15)) if work.draws_token else None) for work in plan.work]
        return [*plan.events, *self._scheduler.complete(plan, results)]

    def close(self) -> None: ...


class RealEngine:
    """The engine as it is; busy while this process computes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.busy = 0.0

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def add(self, submit: Submit) -> list[SequenceEvent]:
        return self._engine.add(submit)

    def step(self) -> list[SequenceEvent]:
        started_s = time.process_time()
        events, _ = self._engine.step()
        self.busy += time.process_time() - started_s
        return events

    def close(self) -> None:
        self._engine.close()


@dataclass
class Asked:
    """One request: when it arrived and when its first token came, on every clock."""

    tenant: str
    arrived: dict[str, float]
    first: dict[str, float] | None = None


@dataclass
class Client:
    """Sends one request at a time; `due` is when the next one leaves, on the engine's clock."""

    tenant: str
    due: float
    is_waiting: bool = False


@dataclass
class Run:
    """An engine, its clock and its clients."""

    engine: RealEngine | SchedulerAlone
    slowness: float
    random: random.Random
    think: float
    prompt: tuple[int, int]
    clock: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLOCKS, 0.0))
    clients: dict[str, Client] = field(default_factory=dict)  # by the sequence they wait for
    idle: list[Client] = field(default_factory=list)
    asked: dict[str, Asked] = field(default_factory=dict)
    count: int = 0

    def step(self) -> None:
        """Let those arrive whose time has come, run one step, and note what it brought."""
        if not self.engine.has_work:
            self.clock["busy"] = max(self.clock["busy"], min(client.due for client in self.idle))
        for client in [client for client in self.idle if client.due <= self.clock["busy"]]:
            self.idle.remove(client)
            self._send(client)
        busy, wall_s = self.engine.busy, time.perf_counter()
        events = self.engine.step()
        self.clock["steps"] += 1
        self.clock["busy"] += (self.engine.busy - busy) * self.slowness
        self.clock["wall"] += (time.perf_counter() - wall_s) * self.slowness
        for event in events:
            asked = self.asked[event.sequence_id]
            if asked.first is None and event.tokens:
                asked.first = dict(self.clock)
            if event.finish_reason is not None:
                if event.finish_reason != "length":
                    raise RuntimeError(f"a request ended with {event.finish_reason}: {event.error_message}")
                client = self.clients.pop(event.sequence_id)
                client.due = self.clock["busy"] + self.random.uniform(0, 2 * self.think)
                self.idle.append(client)

    def _send(self, client: Client) -> None:
        self.count += 1
        name = f"{client.tenant}{self.count}"
        prompt = tuple(self.random.randrange(1000, 20000) for _ in range(self.random.randint(*self.prompt)))
        self.asked[name] = Asked(client.tenant, {**self.clock, "busy": client.due})
        self.clients[name] = client
        sampling = Sampling(max_new_tokens=NEW_TOKENS)
        refusals = self.engine.add(Submit(sequence_id=name, tenant=client.tenant, prompt_ids=prompt, terms=(), sampling=sampling))
        if refusals:
            raise RuntimeError(f"the engine refused a request: {refusals[0].error_message}")


def measure(options: argparse.Namespace, state: Path, *, share: int, load: int) -> dict[str, list[float]]:
    """Times to first token of tenant B, by clock.

    Args:
        share: B's part of the engine is one in so many. load: A's clients for each of B's.
    """
    engine = SchedulerAlone(options, share) if options.engine == "scheduler" else _open(options, state, share)
    try:
        run = Run(engine, float(share), random.Random(options.seed), options.think, tuple(options.prompt))  # noqa: S311 - a workload
        for tenant, count in (("a", load * options.clients), ("b", options.clients)):
            run.idle.extend(Client(tenant, 0.0) for index in range(count))
        while True:
            run.step()
            done = [asked for asked in run.asked.values() if asked.tenant == "b" and asked.first is not None]
            if len(done) >= options.warmup + options.requests:
                break
        counted = done[options.warmup :]
        return {clock: sorted(asked.first[clock] - asked.arrived[clock] for asked in counted if asked.first) for clock in CLOCKS}
    finally:
        engine.close()


def _open(options: argparse.Namespace, state: Path, share: int) -> RealEngine:
    settings = EngineSettings(
        threads=options.threads,
        kernels=options.kernels,
        kv_cache_bytes=options.kv_mib * (1 << 20) // share,
        max_sequences=options.sequences // share,
        max_batch_tokens=options.rows // share,
        queue_limit=1 << 16,
    )
    return RealEngine(open_engine(ModelSettings(path=options.model), settings, AdapterSettings(), state))


def percentile(values: list[float], percent: int) -> float:
    """The smallest value that at least so many percent are not above."""
    return values[max(0, -(-len(values) * percent // 100) - 1)]


def summary(alone: dict[str, list[float]], beside: dict[str, list[float]]) -> dict[str, Any]:
    """p50 and p99 of both sides and their ratios, by clock."""
    found: dict[str, Any] = {}
    for clock in CLOCKS:
        for percent in (50, 99):
            sides = [percentile(side[clock], percent) for side in (alone, beside)]
            found[f"{clock}_p{percent}"] = {
                "alone": round(sides[0], 4),
                "beside": round(sides[1], 4),
                "ratio": round(sides[1] / sides[0], 3) if sides[0] else None,
            }
    return found


def main() -> None:
    """Run both sides and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--engine", choices=("real", "scheduler"), default="real")
    parser.add_argument("--step-cost", type=float, default=30.0, help="rows that a step costs beside its own; scheduler alone")
    parser.add_argument("--kv-blocks", type=int, default=800, help=f"of {BLOCK_TOKENS} tokens; scheduler alone")
    parser.add_argument("--prompt", type=int, nargs=2, default=(32, 96), metavar=("LEAST", "MOST"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--kv-mib", type=int, default=256)
    parser.add_argument("--clients", type=int, default=4, help="of tenant B")
    parser.add_argument("--load", type=int, default=100, help="clients of tenant A for each of B's")
    parser.add_argument("--requests", type=int, default=120, help="of tenant B that count")
    parser.add_argument("--warmup", type=int, default=12, help="of tenant B that do not")
    parser.add_argument("--think", type=float, default=0.5, help="mean pause of a client, CPU seconds or cost of rows")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        alone = measure(options, Path(directory), share=2, load=0)
        beside = measure(options, Path(directory), share=1, load=options.load)
    given = {key: value for key, value in vars(options).items() if key != "out"}
    line = {"what": "fairness", **given, "cores": os.cpu_count(), "machine": platform.machine(), **summary(alone, beside)}
    print(json.dumps(line))
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
