"""Adapters that cannot be used, remembered for a while, so that asking again costs nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from node.errors import AdapterError

MAX_FAILURES = 4096


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error to raise again. A new one each time: an exception collects the traceback of everyone it was raised to."""

    kind: type[AdapterError]
    message: str
    code: str
    param: str | None
    retry_after_s: float | None
    state: Hashable
    until_s: float


class Failures:
    """The negative cache.

    Args:
        keep_s: How long a failure holds. One that may pass by itself holds at most as long as it asks callers to wait.
        clock: Monotonic seconds.
    """

    def __init__(self, keep_s: float, clock: Callable[[], float]) -> None:
        self._keep_s = keep_s
        self._clock = clock
        self._failures: OrderedDict[Hashable, _Failure] = OrderedDict()

    def remember(self, key: Hashable, error: AdapterError, state: Hashable = None) -> None:
        """Keep `error` for `key`, as long as `state` (the files' fingerprint) stays what it is."""
        wait_s = self._keep_s if error.retry_after_s is None else min(self._keep_s, error.retry_after_s)
        self._failures[key] = _Failure(
            type(error), error.message, error.error_code, error.param, error.retry_after_s, state, self._clock() + wait_s
        )
        self._failures.move_to_end(key)
        while len(self._failures) > MAX_FAILURES:
            self._failures.popitem(last=False)

    def raise_known(self, key: Hashable, state: Hashable = None) -> None:
        """Raise what is remembered for `key` and still holds; return where nothing is."""
        failure = self._failures.get(key)
        if failure is None:
            return
        if failure.until_s <= self._clock() or failure.state != state:
            del self._failures[key]
            return
        raise failure.kind(failure.message, code=failure.code, param=failure.param, retry_after_s=failure.retry_after_s)
