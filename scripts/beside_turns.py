"""What an adapter load in progress costs the requests that run beside it.

Short requests come at the same steps on both sides of a pair, so that both have the same prompts in their steps; on one side
their adapters must be read from files and copied, on the other theirs is resident. What differs is what a load moves.

Every running request gets a token a step, so a quantile over their gaps is one over steps. A step with a prompt in it takes
longer than one without; where such steps are about one in a hundred, a 99th percentile flips between the two kinds, so `every`
keeps their share far above that, and the row says what it was.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from bench_report import stolen_s
from bench_runs import Bench, Request, Trace

from node.request import AdapterTerm

RUNNING_PROMPT, SHORT_PROMPT = 64, 16
SKIPPED = 8  # tokens of a turn before its first gap: by then all prompts are computed
PERCENTS = (50, 90, 99, 99.9)
DRAWS = 2000
LONGEST = 8
KINDS = ("resident", "loading")


@dataclass(frozen=True, slots=True)
class Step:
    """How long the running requests waited for a token, and whether a short request had its prompt computed meanwhile."""

    ms: float
    is_mixed: bool


@dataclass(slots=True)
class Turn:
    """The steps of one turn."""

    steps: list[Step] = field(default_factory=list)
    file_loads: int = 0
    stolen_s: float = 0.0

    @property
    def step_ms(self) -> list[float]:
        return [step.ms for step in self.steps]


def beside(
    bench: Bench,
    running: Sequence[AdapterTerm],
    another: AdapterTerm,
    loads: Sequence[AdapterTerm],
    pairs: int,
    new: int,
    every: int,
) -> dict[str, Any]:
    """The row of `pairs` turns of each kind.

    Args:
        running: One running request each. another: of the short requests on the resident side; no running request names it.
        loads: More than the GPU and host memory hold together, or they are found there when their turn comes again.
        new: Tokens of a running request, and so steps of a turn. every: steps from one short request to the next.
    """
    pending = itertools.cycle(loads)
    shorts: dict[str, Callable[[], AdapterTerm]] = {"resident": lambda: another, "loading": lambda: next(pending)}
    for kind in KINDS:
        _turn(bench, running, shorts[kind], 4 * every, every)
    turns: dict[str, list[Turn]] = {kind: [] for kind in KINDS}
    for index in range(pairs):
        for kind in KINDS if index % 2 == 0 else KINDS[::-1]:
            bench.run([Request((another,), SHORT_PROMPT, 1)])  # the loads of the turn before may have displaced it
            turns[kind].append(_turn(bench, running, shorts[kind], new, every))
    row = {
        "row": "beside",
        "pairs": pairs,
        "running": len(running),
        "every": every,
        "steps_of_turn": len(turns[KINDS[0]][0].step_ms),
    }
    return row | _compared(turns["loading"], turns["resident"]) | {kind: _described(turns[kind]) for kind in KINDS}


def _turn(bench: Bench, running: Sequence[AdapterTerm], short: Callable[[], AdapterTerm], new: int, every: int) -> Turn:
    """Until the running requests have `new` tokens each. The last short one comes early enough to be over by then."""
    trace, turn, started = Trace({}), Turn(), time.perf_counter()
    before, before_stolen_s = bench.engine.stats().adapter_file_loads_total, stolen_s()
    names = [bench.submit(Request((term,), RUNNING_PROMPT, new)) for term in running]
    last_s, asked = 0.0, set()
    while (done := min(len(trace.token_s.get(name, ())) for name in names)) < new:
        if done >= SKIPPED and done % every == 0 and done + 2 * every < new and done not in asked:
            asked.add(done)
            bench.submit(Request((short(),), SHORT_PROMPT, 1))
        known = len(trace.token_s)
        if not bench.step(trace, started) or len(trace.token_s.get(names[0], ())) == done:
            continue
        now_s = trace.token_s[names[0]][-1]
        if done >= SKIPPED:
            turn.steps.append(Step(1e3 * (now_s - last_s), len(trace.token_s) > known))
        last_s = now_s
    while bench.engine.has_work:
        bench.step(trace, started)
    turn.file_loads = bench.engine.stats().adapter_file_loads_total - before
    turn.stolen_s = stolen_s() - before_stolen_s
    return turn


def _compared(late: Sequence[Turn], early: Sequence[Turn]) -> dict[str, float]:
    """Ratios of the quantiles of all steps of both sides, with 95 % intervals: pairs are drawn with replacement."""
    sides = [[np.asarray(turn.step_ms) for turn in side] for side in (late, early)]
    chosen = np.random.default_rng(3).integers(0, len(late), (DRAWS, len(late)))
    drawn = [np.asarray([np.percentile(np.concatenate([side[i] for i in one]), PERCENTS) for one in chosen]) for side in sides]
    found = [np.percentile(np.concatenate(side), PERCENTS) for side in sides]
    limits = np.percentile(drawn[0] / drawn[1], (2.5, 97.5), axis=0)
    row: dict[str, float] = {}
    for index, percent in enumerate(PERCENTS):
        ratios = {"ratio": found[0][index] / found[1][index], "low": limits[0][index], "high": limits[1][index]}
        row |= {f"p{percent:g}_{name}": float(value) for name, value in ratios.items()}
        row |= {f"{kind}_p{percent:g}_ms": float(found[side][index]) for side, kind in enumerate(KINDS[::-1])}
    return row


def _described(turns: Sequence[Turn]) -> dict[str, Any]:
    """What one side's steps were: share and median of those with a prompt and of those without, each turn's p99, the longest."""
    steps = [(step, f"{turn}:{index}") for turn, of in enumerate(turns) for index, step in enumerate(of.steps)]
    kinds = {
        name: [step.ms for step, _ in steps if step.is_mixed == is_mixed]
        for name, is_mixed in (("decode", False), ("mixed", True))
    }
    longest = sorted(steps, key=lambda item: -item[0].ms)[:LONGEST]
    return {
        "steps": len(steps),
        "file_loads": sum(turn.file_loads for turn in turns),
        "mixed_share": round(len(kinds["mixed"]) / len(steps), 4),
        **{f"{name}_median_ms": round(statistics.median(values), 4) for name, values in kinds.items() if values},
        "stolen_s": round(sum(turn.stolen_s for turn in turns), 2),
        "p99_of_turns_ms": [round(float(np.percentile(turn.step_ms, 99)), 3) for turn in turns],
        "longest": [(round(step.ms, 3), "mixed" if step.is_mixed else "decode", where) for step, where in longest],
    }
