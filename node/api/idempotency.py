"""`Idempotency-Key`: the same request sent again gets the answer of the first, and nothing is run or charged twice.

After the IETF draft "The Idempotency-Key HTTP Header Field". Answers are kept in memory: a restarted node has forgotten them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from node.errors import EngineError, OverloadedError, RequestError, UnsupportedError

HEADER = "Idempotency-Key"
REPLAYED = "idempotency-replayed"
_MAX_KEY_CHARS = 255
_MAX_WAITING = 32
_KEPT_OVERHEAD_BYTES = 1024  # what an entry weighs besides its answer

Work = Callable[[], Coroutine[Any, Any, web.Response]]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a replay needs of a response that has left."""

    body: bytes
    content_type: str
    headers: dict[str, str]

    def again(self) -> web.Response:
        return web.Response(body=self.body, content_type=self.content_type, headers=self.headers | {REPLAYED: "true"})


@dataclass(slots=True)
class _Run:
    """One key: the request it stands for, the task that answers it, and the answer."""

    digest: bytes
    task: asyncio.Task[web.Response]
    waiting_count: int = 0
    ended_s: float = 0.0
    answer: _Answer | None = None

    @property
    def size_bytes(self) -> int:
        return _KEPT_OVERHEAD_BYTES + len(self.answer.body) if self.answer is not None else 0


@dataclass(slots=True)
class _Scope:
    """The keys of one tenant; those with an answer in the order in which it came."""

    running: dict[str, _Run] = field(default_factory=dict)
    ended: dict[str, _Run] = field(default_factory=dict)
    size_bytes: int = 0

    def end(self, key: str, run: _Run) -> None:
        del self.running[key]
        if run.answer is not None:
            self.ended[key] = run
            self.size_bytes += run.size_bytes

    def drop_oldest(self) -> int:
        run = self.ended.pop(next(iter(self.ended)))
        self.size_bytes -= run.size_bytes
        return run.size_bytes

    def drop_before(self, time_s: float) -> int:
        dropped_bytes = 0
        while self.ended and next(iter(self.ended.values())).ended_s <= time_s:
            dropped_bytes += self.drop_oldest()
        return dropped_bytes


class Replays:
    """Runs each key's request once. Keys are a tenant's own: the same key of another tenant is another key.

    Semantics: only answers with status 200 are kept, so what failed may be tried again. A run that has a key goes on when its
    client hangs up, since a client that sends one means to come back for the answer.

    Args:
        keep_s: How long an answer is kept once it is there.
        max_bytes: Of all answers kept; the scope that holds most loses its oldest first.
        clock: Monotonic seconds.
    """

    def __init__(self, keep_s: float, max_bytes: int, clock: Callable[[], float]) -> None:
        self._keep_s = keep_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._scopes: dict[str, _Scope] = {}
        self._size_bytes = 0

    async def answer(self, scope_name: str, keys: Sequence[str], body: dict[str, Any], work: Work) -> web.Response:
        """The answer to `body`: of `work`, or of the run that had this key first.

        Args:
            scope_name: Whose keys these are; part of nothing that leaves the node.
            keys: The header's values; without any, `work` is simply run.

        Raises:
            RequestError: Malformed key; idempotency_key_reused: the key stands for another request.
            OverloadedError: Too many wait for the same run.
        """
        if not keys:
            return await work()
        key, digest = _read(keys), await asyncio.to_thread(_digest, body)
        self._expire()
        scope = self._scopes.setdefault(scope_name, _Scope())
        known = scope.running.get(key) or scope.ended.get(key)
        if known is None:
            return await asyncio.shield(self._start(scope_name, key, digest, work))
        if known.digest != digest:
            raise RequestError(
                f"the {HEADER} {key[:64]!r} was used for another request; send a new key with each new request",
                code="idempotency_key_reused",
                param=HEADER,
            )
        return await _replay(known)

    async def close(self) -> None:
        """Cancel what still runs; its books are closed when this returns."""
        tasks = [run.task for scope in self._scopes.values() for run in scope.running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, scope_name: str, key: str, digest: bytes, work: Work) -> asyncio.Task[web.Response]:
        task = asyncio.create_task(work())
        run = self._scopes[scope_name].running[key] = _Run(digest, task)
        task.add_done_callback(lambda _: self._end(scope_name, key, run))
        return task

    def _end(self, scope_name: str, key: str, run: _Run) -> None:
        run.answer = _answer_of(run.task)
        run.ended_s = self._clock()
        self._scopes[scope_name].end(key, run)
        self._size_bytes += run.size_bytes
        while self._size_bytes > self._max_bytes:
            self._size_bytes -= max(self._scopes.values(), key=lambda scope: scope.size_bytes).drop_oldest()

    def _expire(self) -> None:
        oldest_s = self._clock() - self._keep_s
        for name, scope in list(self._scopes.items()):
            self._size_bytes -= scope.drop_before(oldest_s)
            if not scope.running and not scope.ended:
                del self._scopes[name]


def _answer_of(task: asyncio.Task[web.Response]) -> _Answer | None:
    if task.cancelled() or task.exception() is not None:
        return None
    response = task.result()
    if response.status != 200 or not isinstance(response.body, bytes):
        return None
    headers = {name: value for name, value in response.headers.items() if name.lower().startswith("x-")}
    return _Answer(response.body, response.content_type, headers)


async def _replay(known: _Run) -> web.Response:
    """The same answer, or the same error where it is only just failing."""
    if known.waiting_count >= _MAX_WAITING:
        raise OverloadedError(f"{_MAX_WAITING} requests wait for the answer to this {HEADER}; retry later", retry_after_s=1.0)
    known.waiting_count += 1
    try:
        await asyncio.wait([known.task])
    finally:
        known.waiting_count -= 1
    if known.task.cancelled():
        raise EngineError("the node is stopping and gave this request up; retry later", retry_after_s=1.0)
    answer = known.answer or _answer_of(known.task)
    if answer is None:
        raise known.task.exception() or EngineError("the first request with this key has no answer; send it again")
    return answer.again()


def refuse_streamed(keys: Sequence[str]) -> None:
    """A stream is charged as it is delivered, so a broken one cannot be played again as if it had not been.

    Raises:
        UnsupportedError: The header is there.
    """
    if keys:
        raise UnsupportedError(
            f"{HEADER} is not supported with a streamed answer, which costs what was delivered of it; "
            "leave the header out, or set `stream` to false",
            param=HEADER,
        )


def _read(keys: Sequence[str]) -> str:
    key = keys[0]
    if len(keys) > 1 or not 0 < len(key) <= _MAX_KEY_CHARS or not (key.isascii() and key.isprintable()):
        raise RequestError(
            f"{HEADER} must be sent once, with 1 to {_MAX_KEY_CHARS} printable ASCII characters. Given: {len(keys)} of them, "
            f"the first of {len(key)} characters",
            param=HEADER,
        )
    return key


def _digest(body: dict[str, Any]) -> bytes:
    """Of what the body says: another order of its fields is the same request."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
