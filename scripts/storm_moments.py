"""Where in a storm the slowest hot requests lie, and what they waited for, as far as clients can see it.

Every stream gets one token a step, so the streams beside a request tell how many steps passed before its first token, and how
long they took: a tail of more steps is queueing, one of longer steps is the engine or the event loop, one of neither lies
outside both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from storm_figures import Phase, Round

SLOWEST = 0.05  # of a side's requests
CALM = "before and after"


@dataclass(frozen=True, slots=True)
class Streamed:
    """One hot answer: when its request was sent, when its tokens arrived, and when the event that ended it, in seconds of one
    clock of the whole machine. None in older files, where that was the last token's event."""

    sent_s: float
    event_s: Sequence[float]
    end_s: float | None = None

    @property
    def ttft_s(self) -> float:
        """From the request to the first token."""
        return self.event_s[0] - self.sent_s


@dataclass(frozen=True, slots=True)
class Moments:
    """What a storm did when: names with their first and last second. The first that touches a request's wait has it."""

    spans: tuple[tuple[str, float, float], ...]

    @classmethod
    def of(cls, cold: dict[str, Any], latency_s: float) -> Moments:
        """`refusing` until the last 429, `arriving` from the source's first answers to our last answer, `asking` between."""
        begun_s = cold["begun_s"]
        refused_s = max((ended_s for status, ended_s in cold["ended"] if status == 429), default=begun_s)
        last_s = max((ended_s for status, ended_s in cold["ended"] if status != 429), default=begun_s)
        spans = (("refusing", begun_s, refused_s), ("arriving", begun_s + latency_s, last_s))
        return cls((*spans, ("asking", refused_s, begun_s + latency_s)))

    def name(self, from_s: float, to_s: float) -> str:
        """The moment of a wait."""
        return next((name for name, begun_s, ended_s in self.spans if from_s < ended_s and begun_s < to_s), CALM)


def slowest_requests(rounds: Sequence[Round], latency_s: float) -> dict[str, Any]:
    """Keys of a storm's row: `moments` of the storm with their quantiles and the share of requests slower than the p99 alone;
    `slowest`: of the slowest requests of both sides the mean TTFT, steps waited and longest step, [alone, beside]."""
    limit_s = float(np.quantile([found.ttft_s for r in rounds for found in r.alone.answers], 0.99))
    sides = [[_waits(getattr(r, side)) for r in rounds] for side in ("alone", "beside")]
    means = [np.mean(np.concatenate(side), axis=0) for side in sides]
    keys = ("ttft_ms", "steps", "longest_step_ms")
    slowest = {key: [round(float(mean[index]), 2) for mean in means] for index, key in enumerate(keys)}
    return {"slower_than_ms": round(1000 * limit_s, 3), "moments": _by_moment(rounds, latency_s, limit_s), "slowest": slowest}


def _by_moment(rounds: Sequence[Round], latency_s: float, limit_s: float) -> dict[str, Any]:
    ttft: dict[str, list[float]] = {}
    gaps: dict[str, list[float]] = {}
    for one in rounds:
        moments = Moments.of(one.cold, latency_s)
        for found in one.beside.answers:
            ttft.setdefault(moments.name(found.sent_s, found.event_s[0]), []).append(found.ttft_s)
            for early_s, late_s in pairwise(found.event_s):
                gaps.setdefault(moments.name(early_s, late_s), []).append(late_s - early_s)
    return {
        name: {
            "requests": len(values),
            "slower": sum(value > limit_s for value in values),
            "ttft_p50_ms": _quantile_ms(values, 0.5),
            "ttft_p99_ms": _quantile_ms(values, 0.99),
            "itl_p99_ms": _quantile_ms(gaps.get(name, []), 0.99),
        }
        for name, values in sorted(ttft.items())
    }


def _quantile_ms(values: Sequence[float], quantile: float) -> float | None:
    return round(1000 * float(np.quantile(values, quantile)), 3) if values else None


def _waits(phase: Phase) -> Any:
    """[slowest, 3] of a phase: TTFT in ms, steps seen by the others before the first token, the longest of them in ms."""
    whose = np.concatenate([np.full(len(found.event_s) - 1, index) for index, found in enumerate(phase.answers)])
    early_s = np.concatenate([found.event_s[:-1] for found in phase.answers])
    late_s = np.concatenate([found.event_s[1:] for found in phase.answers])
    order = sorted(range(len(phase.answers)), key=lambda index: -phase.answers[index].ttft_s)
    rows = []
    for index in order[: max(1, round(SLOWEST * len(order)))]:
        found = phase.answers[index]
        touches = (whose != index) & (late_s > found.sent_s) & (early_s < found.event_s[0])
        steps = np.bincount(whose[touches]).max(initial=0)
        longest_s = (late_s - early_s)[touches].max(initial=0.0)
        rows.append((1000 * found.ttft_s, float(steps), 1000 * float(longest_s)))
    return np.asarray(rows)
