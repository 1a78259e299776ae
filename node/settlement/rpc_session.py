"""HTTP to a chain's endpoint with bounds: no redirects, no endless bodies, no endless waits."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError

from node.settlement.json_bounds import has_too_many_brackets

MAX_ANSWER_BYTES = 8 << 20


class AnswerTooLarge(requests.RequestException):
    """The endpoint sent more than the limit, or took longer than the limit to send it."""


class BoundedSession(requests.Session):
    """A session whose answers are read up to a limit in bytes and in time.

    Why not the plain one: it follows redirects, and its timeout is for each read: one byte a second would hold a thread.

    Args:
        timeout_s: For connecting, and for the whole answer.
        limit_bytes: Longest accepted body.
    """

    def __init__(self, timeout_s: float, limit_bytes: int = MAX_ANSWER_BYTES) -> None:
        super().__init__()
        self.headers["Accept-Encoding"] = "identity"  # a small compressed body may hide an endless one
        self.trust_env = False  # a proxy or .netrc from the environment would see every request
        self._timeout_s, self._limit_bytes = timeout_s, limit_bytes

    def request(self, method: Any, url: Any, *args: Any, **options: Any) -> requests.Response:
        """As the parent class, within the bounds."""
        deadline_s = time.monotonic() + self._timeout_s
        options |= {"stream": True, "allow_redirects": False, "timeout": self._timeout_s}
        response = super().request(method, url, *args, **options)
        body = bytearray()
        try:
            while chunk := response.raw.read1(64 << 10):  # read1: what has arrived, without waiting for more
                body += chunk
                if len(body) > self._limit_bytes or time.monotonic() > deadline_s:
                    raise AnswerTooLarge("answer over the limit")
        except HTTPError as error:
            raise requests.ConnectionError("the answer broke off") from error
        finally:
            response.close()
        if has_too_many_brackets(body):
            raise AnswerTooLarge("answer nested too deeply")
        response._content = bytes(body)
        return response


def host_of(rpc_url: str) -> str:
    """The endpoint without user, path and query, where keys are often kept."""
    parts = urlsplit(rpc_url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
