"""API keys: who may call, known by hash only."""

from __future__ import annotations

import hashlib
import hmac
import stat
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

from node.errors import AuthError, ConfigError, OverloadedError

_MAX_KEY_CHARS = 512
_MAX_FAILURES = 100  # wrong keys from one address within the window
_WINDOW_S = 60.0
_MAX_ADDRESSES = 4096


class ApiKeys:
    """The keys of this node.

    Keys are compared by SHA-256 digest, every one of them every time, so that neither length nor position of a match shows in
    the time the answer takes. Addresses that keep guessing are refused for a while.

    Args:
        digests: SHA-256 of each key, by the name of its holder.
        clock: Monotonic seconds.
    """

    def __init__(self, digests: Mapping[str, bytes], clock: Callable[[], float]) -> None:
        self._digests = dict(digests)
        self._clock = clock
        self._failures: OrderedDict[str, tuple[float, int]] = OrderedDict()

    @classmethod
    def read(cls, path: Path, clock: Callable[[], float]) -> ApiKeys:
        """Read a file of "name key" lines; blank lines and lines that begin with # are skipped.

        Raises:
            ConfigError: The file is missing, readable by others, empty or malformed. No message repeats a key.
        """
        try:
            mode = path.stat().st_mode
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"server.api_keys_file {path} cannot be read as UTF-8 text; check path and permissions") from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(
                f"server.api_keys_file {path} has mode {stat.S_IMODE(mode):04o}; run chmod 600 on it", code="secret_permissions"
            )
        digests: dict[str, bytes] = {}
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2 or words[0] in digests or len(words[1]) < 16:
                raise ConfigError(
                    f"server.api_keys_file {path}, line {number}: write one unused name and one key of at least 16 characters"
                )
            digests[words[0]] = hashlib.sha256(words[1].encode()).digest()
        if not digests:
            raise ConfigError(f"server.api_keys_file {path} holds no key; write one 'name key' pair a line")
        return cls(digests, clock)

    def check(self, authorization: list[str], address: str) -> str:
        """Name of the caller.

        Args:
            authorization: All Authorization headers of the request; exactly one is acceptable.
            address: Where the request came from, for counting failures.

        Raises:
            AuthError: One text for every reason, so that it teaches nothing.
            OverloadedError: Too many wrong keys from this address.
        """
        self._refuse_guessing(address)
        token = bearer_token(authorization) or ""
        given = hashlib.sha256(token[:_MAX_KEY_CHARS].encode("utf-8", "surrogateescape")).digest()
        matched = None
        for name, digest in self._digests.items():
            if hmac.compare_digest(digest, given):
                matched = name
        if matched is None or len(token) > _MAX_KEY_CHARS:
            self._count_failure(address)
            raise AuthError("the API key is missing or wrong; send it as 'Authorization: Bearer KEY'")
        return matched

    def _refuse_guessing(self, address: str) -> None:
        since, count = self._failures.get(address, (0.0, 0))
        wait_s = since + _WINDOW_S - self._clock()
        if count >= _MAX_FAILURES and wait_s > 0:
            raise OverloadedError(
                f"more than {_MAX_FAILURES} wrong API keys from this address within {_WINDOW_S:g} s; wait and use a valid key",
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )

    def _count_failure(self, address: str) -> None:
        now = self._clock()
        since, count = self._failures.pop(address, (now, 0))
        self._failures[address] = (now, 1) if now - since > _WINDOW_S else (since, count + 1)
        if len(self._failures) > _MAX_ADDRESSES:
            self._failures.popitem(last=False)


def bearer_token(authorization: list[str]) -> str | None:
    """The token of the one Authorization header; None for none, several, or another scheme."""
    if len(authorization) != 1:
        return None
    scheme, _, token = authorization[0].partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
