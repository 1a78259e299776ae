"""Requests on an engine of this process, as its benchmarks make them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from node.engine.engine import Engine
from node.engine.messages import Submit
from node.request import AdapterTerm, Sampling

IDLE_S = 0.001


class Bell:
    """What the loader rings; the stand-in for the wait of the engine's loop."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def ring(self) -> None:
        self._event.set()

    def wait(self) -> None:
        """As `EngineLoop` sleeps when a step computed nothing."""
        self._event.wait(IDLE_S)
        self._event.clear()


@dataclass(frozen=True)
class Request:
    """What is asked, in tokens."""

    terms: tuple[AdapterTerm, ...]
    prompt: int
    new: int


@dataclass
class Trace:
    """When each request's tokens came, seconds since submission."""

    token_s: dict[str, list[float]]

    @property
    def first_s(self) -> list[float]:
        return [moments[0] for moments in self.token_s.values()]

    @property
    def total_s(self) -> float:
        return max(moments[-1] for moments in self.token_s.values())

    @property
    def token_count(self) -> int:
        return sum(map(len, self.token_s.values()))


class Bench:
    """Runs requests on an engine of this process."""

    def __init__(self, engine: Engine, bell: Bell, seed: int = 0) -> None:
        self.engine = engine
        self._bell = bell
        self._random = np.random.default_rng(seed)
        self._count = 0

    def submit(self, request: Request) -> str:
        return self._add(self._make(request))

    def _make(self, request: Request) -> Submit:
        self._count += 1
        name = f"r{self._count}"
        prompt = self._random.integers(10, self.engine.ready.vocab_size - 10, request.prompt)
        sampling = Sampling(max_new_tokens=request.new)
        return Submit(sequence_id=name, tenant="bench", prompt_ids=tuple(prompt.tolist()), terms=request.terms, sampling=sampling)

    def _add(self, submit: Submit) -> str:
        for event in self.engine.add(submit):
            raise SystemExit(f"the engine refused: {event.error_code}: {event.error_message}")
        return submit.sequence_id

    def step(self, trace: Trace, started: float) -> bool:
        """One turn of the loop; returns whether anything was computed."""
        events, has_computed = self.engine.step()
        now = time.perf_counter() - started
        for event in events:
            if event.finish_reason == "error":
                raise SystemExit(f"the engine failed: {event.error_code}: {event.error_message}")
            trace.token_s.setdefault(event.sequence_id, []).extend([now] * len(event.tokens))
        if not has_computed:
            self._bell.wait()
        return has_computed

    def run(self, requests: Sequence[Request]) -> Trace:
        """All requests together, until the last token."""
        trace = Trace({})
        submits = [self._make(request) for request in requests]
        started = time.perf_counter()
        for submit in submits:
            self._add(submit)
        while self.engine.has_work:
            self.step(trace, started)
        return trace
