"""Addresses that keep sending wrong keys."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Callable

MAX_GUESSES = 100  # wrong keys from one address within the window
WINDOW_S = 60.0
MAX_ADDRESSES = 4096


class Guesses:
    """Counts wrong keys by address, in a table of bounded size. An IPv6 network of 64 bits is one address: one host owns it all.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def blocked_s(self, address: str) -> float:
        """Seconds until the address may guess again; 0 when it may now."""
        since_s, count = self._wrong.get(_network(address), (0.0, 0))
        return max(0.0, since_s + WINDOW_S - self._clock()) if count >= MAX_GUESSES else 0.0

    def count(self, address: str) -> None:
        """One more wrong key."""
        key, now_s = _network(address), self._clock()
        since_s, count = self._wrong.pop(key, (now_s, 0))
        self._wrong[key] = (now_s, 1) if now_s - since_s > WINDOW_S else (since_s, count + 1)
        if len(self._wrong) > MAX_ADDRESSES:
            self._wrong.popitem(last=False)


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if parsed.version == 4:
        return str(parsed)
    mapped = parsed.ipv4_mapped
    return str(mapped) if mapped is not None else str(ipaddress.ip_network((int(parsed), 64), strict=False))
