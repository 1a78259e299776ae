"""What is kept of a storm's phases, and how the two sides compare."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from bench_engine import median_interval
from storm_moments import Streamed


@dataclass(frozen=True, slots=True)
class Phase:
    """The hot load for a while. CPU seconds are those of the node's processes meanwhile; `stolen_s` is what the hypervisor took
    of all cores, None in older files."""

    answers: list[Streamed]
    steps: float
    cpu_s: dict[str, float]
    stolen_s: float | None = None

    @property
    def ttft_s(self) -> list[float]:
        """Of every request."""
        return [found.ttft_s for found in self.answers]

    @property
    def gap_s(self) -> list[float]:
        """Between a request's tokens. The event that ends an answer is none."""
        return [late_s - early_s for found in self.answers for early_s, late_s in pairwise(found.event_s)]

    @property
    def end_wait_s(self) -> list[float]:
        """Of every request, from its last token to the event that ends it, which waits for the record."""
        return [found.end_s - found.event_s[-1] for found in self.answers if found.end_s is not None]

    @property
    def tokens(self) -> int:
        """That all requests got."""
        return sum(len(found.event_s) for found in self.answers)


@dataclass(frozen=True, slots=True)
class Round:
    """One pair of phases. `late`: from when to when the machine was, by a process that only sleeps; None in older files."""

    alone: Phase
    beside: Phase
    cold: dict[str, Any]
    hub: dict[str, int]
    late: Sequence[Sequence[float]] | None = None


VALUES = (("ttft", "ttft_s"), ("itl", "gap_s"))
QUANTILES = (("p50", 0.5), ("p99", 0.99))
DRAWS = 500
CATCH_UP_S = 0.03  # around a moment in which the machine was late


def write_round(file: Path, found: Round) -> None:
    """Add everything a round observed to a file, as one line of JSON with microseconds."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(_rounded(asdict(found)), separators=(",", ":")) + "\n")


def read_rounds(file: Path) -> list[Round]:
    """What `write_round` wrote."""
    return [_round_of(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def _round_of(found: dict[str, Any]) -> Round:
    phases = [Phase([Streamed(**answer) for answer in found[side].pop("answers")], **found[side]) for side in ("alone", "beside")]
    return Round(*phases, cold=found["cold"], hub=found["hub"], late=found.get("late"))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def compared(rounds: list[Round], draws: int = DRAWS) -> dict[str, Any]:
    """Quantiles of both sides over all rounds in milliseconds, their ratios with 95 % intervals, CPU and steps a token."""
    row: dict[str, Any] = {"hot_requests": [sum(len(getattr(r, side).ttft_s) for r in rounds) for side in ("alone", "beside")]}
    for name, values in VALUES:
        sides = [[np.asarray(getattr(getattr(r, side), values)) for r in rounds] for side in ("alone", "beside")]
        found = [1000 * np.quantile(np.concatenate(side), [quantile for _, quantile in QUANTILES]) for side in sides]
        limits = bootstrap(sides[0], sides[1], [quantile for _, quantile in QUANTILES], draws)
        for (part, _), alone, beside, between in zip(QUANTILES, *found, limits, strict=True):
            row[f"{name}_{part}_ms"] = [round(float(alone), 3), round(float(beside), 3)]
            row[f"{name}_{part}_ratio"] = [round(float(beside / alone), 4), *between]
    for part, quantile in QUANTILES:
        waits = [[wait_s for r in rounds for wait_s in getattr(r, side).end_wait_s] for side in ("alone", "beside")]
        if all(waits):
            row[f"last_event_{part}_ms"] = [round(1000 * float(np.quantile(side, quantile)), 3) for side in waits]
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
    stolen = [[getattr(r, side).stolen_s for r in rounds] for side in ("alone", "beside")]
    if all(value is not None for side in stolen for value in side):
        row["stolen_s"] = [round(sum(side), 2) for side in stolen]
    row["cold_statuses"] = {}
    for found in rounds:
        for status, count in found.cold["statuses"].items():
            row["cold_statuses"][status] = row["cold_statuses"].get(status, 0) + count
    row["last_refusal_ms"] = max((r.cold["refused_ms"] for r in rounds if r.cold["refused_ms"]), default=None)
    row["hub"] = {key: sum(r.hub[key] for r in rounds) for key in rounds[0].hub}
    return row


def on_time(rounds: Sequence[Round], draws: int = DRAWS) -> dict[str, Any]:
    """Keys of a storm's row: the p99 of both sides and their ratio without the moments in which the machine was late, and the
    share of each side's time that those are. Says something only where node and clients leave the sleeping process a core."""
    found: dict[str, Any] = {"late_share": [round(_late_share(rounds, side), 4) for side in ("alone", "beside")]}
    for name, pick in (("ttft", _first_waits), ("itl", _later_waits)):
        sides = [[_punctual(pick(getattr(r, side)), r.late or ()) for r in rounds] for side in ("alone", "beside")]
        values = [1000 * float(np.quantile(np.concatenate(side), 0.99)) for side in sides]
        found[f"{name}_p99_ms"] = [round(value, 3) for value in values]
        found[f"{name}_p99_ratio"] = [round(values[1] / values[0], 4), *bootstrap(sides[0], sides[1], [0.99], draws)[0]]
    return {"on_time": found}


def _first_waits(phase: Phase) -> Any:
    return np.asarray([(found.sent_s, found.event_s[0]) for found in phase.answers])


def _later_waits(phase: Phase) -> Any:
    return np.asarray([pair for found in phase.answers for pair in pairwise(found.event_s)])


def _punctual(waits: Any, late: Sequence[Sequence[float]]) -> Any:
    """[n] seconds of the waits [m, 2] that no late moment touches, with what is catching up around it."""
    is_kept = np.ones(len(waits), bool)
    for from_s, to_s in late:
        is_kept &= (waits[:, 1] < from_s - CATCH_UP_S) | (waits[:, 0] > to_s + CATCH_UP_S)
    return (waits[:, 1] - waits[:, 0])[is_kept]


def _late_share(rounds: Sequence[Round], side: str) -> float:
    late_s = total_s = 0.0
    for one in rounds:
        answers = getattr(one, side).answers
        begun_s, ended_s = min(found.sent_s for found in answers), max(found.event_s[-1] for found in answers)
        total_s += ended_s - begun_s
        late_s += sum(max(0.0, min(to_s, ended_s) - max(from_s, begun_s)) for from_s, to_s in one.late or ())
    return late_s / total_s


def _ratio(values: list[float]) -> list[float]:
    return [round(value, 4) for value in median_interval(values)]


def bootstrap(
    alone: Sequence[Any], beside: Sequence[Any], quantiles: Sequence[float], draws: int = DRAWS
) -> list[tuple[float, float]]:
    """95 % interval of the ratio of each quantile of two sides: rounds are drawn with replacement, and values within them."""
    generator = np.random.default_rng(5)
    chosen = generator.integers(0, len(alone), (draws, len(alone)))
    found = [_drawn_quantiles(side, chosen, quantiles, generator) for side in (alone, beside)]
    limits = np.quantile(found[1] / found[0], (0.025, 0.975), axis=0)
    return [(round(float(low), 4), round(float(high), 4)) for low, high in limits.T]


def _drawn_quantiles(side: Sequence[Any], chosen: Any, quantiles: Sequence[float], generator: np.random.Generator) -> Any:
    """[draws, quantiles] of one side, whose rounds `chosen` names [draws, rounds]: the order statistic below each quantile.

    Rounds lie behind each other in one array, so a draw is one row of indices."""
    sizes = np.asarray([len(values) for values in side])
    starts, pool = np.cumsum(sizes) - sizes, np.concatenate(side).astype(np.float32)
    rows = []
    for names in chosen:
        at = np.concatenate([starts[name] + generator.integers(0, sizes[name], sizes[name]) for name in names])
        ranks = [int(quantile * (len(at) - 1)) for quantile in quantiles]
        rows.append(np.partition(pool[at], ranks)[ranks])
    return np.asarray(rows)


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
