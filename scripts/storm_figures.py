"""What is kept of a storm's phases, and how the two sides compare."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from bench_engine import median_interval
from storm_moments import Streamed


@dataclass(frozen=True, slots=True)
class Phase:
    """The hot load for a while. CPU seconds are those of the node's processes meanwhile."""

    answers: list[Streamed]
    steps: float
    cpu_s: dict[str, float]

    @property
    def ttft_s(self) -> list[float]:
        """Of every request."""
        return [found.ttft_s for found in self.answers]

    @property
    def gap_s(self) -> list[float]:
        """Between a request's events."""
        return [late_s - early_s for found in self.answers for early_s, late_s in pairwise(found.event_s)]

    @property
    def tokens(self) -> int:
        """Events of all requests."""
        return sum(len(found.event_s) for found in self.answers)


@dataclass(frozen=True, slots=True)
class Round:
    """One pair of phases."""

    alone: Phase
    beside: Phase
    cold: dict[str, Any]
    hub: dict[str, int]


Quantile = tuple[str, str, float]
QUANTILES: tuple[Quantile, ...] = (
    ("ttft_p50", "ttft_s", 0.5),
    ("ttft_p99", "ttft_s", 0.99),
    ("itl_p50", "gap_s", 0.5),
    ("itl_p99", "gap_s", 0.99),
)


def compared(rounds: list[Round], draws: int = 1000) -> dict[str, Any]:
    """Quantiles of both sides over all rounds in milliseconds, their ratios with 95 % intervals, CPU and steps a token."""
    row: dict[str, Any] = {"hot_requests": [sum(len(getattr(r, side).ttft_s) for r in rounds) for side in ("alone", "beside")]}
    for name, values, quantile in QUANTILES:
        sides = [[np.asarray(getattr(getattr(r, side), values)) for r in rounds] for side in ("alone", "beside")]
        alone, beside = (1000 * float(np.quantile(np.concatenate(side), quantile)) for side in sides)
        low, high = bootstrap(sides[0], sides[1], quantile, draws)
        row |= {f"{name}_ms": [round(alone, 3), round(beside, 3)], f"{name}_ratio": [round(beside / alone, 4), low, high]}
    row["ttft_max_ms"] = [round(1000 * max(max(getattr(r, side).ttft_s) for r in rounds), 2) for side in ("alone", "beside")]
    row["ttft_p99_ratio_by_round"] = [
        round(float(np.quantile(r.beside.ttft_s, 0.99) / np.quantile(r.alone.ttft_s, 0.99)), 3) for r in rounds
    ]
    row["steps_per_token_ratio"] = _ratio([(r.beside.steps / r.beside.tokens) / (r.alone.steps / r.alone.tokens) for r in rounds])
    row["engine_cpu_per_step_ratio"] = _ratio(
        [(r.beside.cpu_s["engine"] / r.beside.steps) / (r.alone.cpu_s["engine"] / r.alone.steps) for r in rounds]
    )
    for name in rounds[0].beside.cpu_s:
        sides = [
            [getattr(r, side).cpu_s.get(name, 0.0) / getattr(r, side).tokens for r in rounds] for side in ("alone", "beside")
        ]
        row[f"{name}_cpu_us_per_token"] = [round(1e6 * statistics.median(side), 2) for side in sides]
        if min(sides[0]) > 0 and name != "fetcher":
            row[f"{name}_cpu_ratio"] = _ratio([late / early for early, late in zip(*sides, strict=True)])
    row["cold_statuses"] = {}
    for found in rounds:
        for status, count in found.cold["statuses"].items():
            row["cold_statuses"][status] = row["cold_statuses"].get(status, 0) + count
    row["last_refusal_ms"] = max((r.cold["refused_ms"] for r in rounds if r.cold["refused_ms"]), default=None)
    row["hub"] = {key: sum(r.hub[key] for r in rounds) for key in rounds[0].hub}
    return row


def _ratio(values: list[float]) -> list[float]:
    return [round(value, 4) for value in median_interval(values)]


def bootstrap(alone: list[Any], beside: list[Any], quantile: float, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of the ratio of two quantiles: rounds are drawn with replacement, and values within them."""
    generator = np.random.default_rng(5)
    ratios = []
    for _ in range(draws):
        chosen = generator.integers(0, len(alone), len(alone))
        sides = [
            np.quantile(
                np.concatenate([side[index][generator.integers(0, len(side[index]), len(side[index]))] for index in chosen]),
                quantile,
            )
            for side in (alone, beside)
        ]
        ratios.append(sides[1] / sides[0])
    low, high = np.quantile(ratios, (0.025, 0.975))
    return round(float(low), 4), round(float(high), 4)


def cpu_seconds(pid: int) -> dict[str, float]:
    """CPU time of the node's processes so far: `api`, its event loop's thread alone (`api_loop`), `engine`, `fetcher`."""
    found = {"api": _process_s(pid), "api_loop": int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        for name, modules in (("engine", (b"node.engine", b"--engine")), ("fetcher", (b"node.adapters.fetch",))):
            if any(module in command for module in modules):
                found[name] = _process_s(int(child))
    return found


def _process_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
