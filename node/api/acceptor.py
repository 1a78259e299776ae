"""Listening sockets whose connections are taken from the kernel a few at a time."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import resource
import socket
from collections.abc import Callable
from typing import Any

ACCEPTS_IN_A_TURN = 8
_PAUSE_S = 1.0  # after the process ran out of descriptors
_DESCRIPTORS = 4096  # 32 kB of the kernel's memory

Accepted = Callable[[socket.socket, str], None]

logger = logging.getLogger(__name__)


class Acceptor:
    """Stands where asyncio's servers do, which take every connection that waits in one turn of the loop and make a transport and
    a protocol of each: two hundred keep everybody else's events waiting for 10 ms.

    Args:
        sockets: They listen, and belong to this object from now on.
        accepted: Gets every connection, not blocking, with its peer's address; whose it is then.
    """

    def __init__(self, sockets: list[socket.socket], accepted: Accepted) -> None:
        self.sockets = sockets
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()
        self._resume: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        """Listen no more."""
        if self._resume is not None:
            self._resume.cancel()
        for listening in self.sockets:
            self._loop.remove_reader(listening)
            listening.close()
        self.sockets = []

    def _listen(self) -> None:
        self._resume = None
        for listening in self.sockets:
            self._loop.add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        """What still waits is heard of again in the loop's next turn."""
        for _ in range(ACCEPTS_IN_A_TURN):
            try:
                connection, peer = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(error)
                return
            connection.setblocking(False)
            self._accepted(connection, str(peer[0]) if peer else "")

    def _pause(self, error: OSError) -> None:
        """Without a descriptor to spare the sockets would be found readable in every turn."""
        logger.error(
            "no connection can be accepted (errno %d); trying again in %g s; check the limit of files", error.errno, _PAUSE_S
        )
        for listening in self.sockets:
            self._loop.remove_reader(listening)
        if self._resume is None:
            self._resume = self._loop.call_later(_PAUSE_S, self._listen)


def reserve_descriptors(count: int = _DESCRIPTORS) -> None:
    """Let the process's table of descriptors have its size now, as far as its limit goes.

    Linux doubles a table that is full, and makes whoever opened the file wait until no other thread looks at the old one: 20 ms
    each for the 129th and the 257th connection of a crowd, and for the tokens of everybody else.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = (count if limit == resource.RLIM_INFINITY else min(count, limit)) - 1
    with open(os.devnull, "rb") as source:
        os.close(fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, last))


async def bound(host: str, port: int, backlog: int) -> list[socket.socket]:
    """Sockets that listen on every address of a host, as asyncio's `create_server` opens them.

    Raises:
        OSError: An address is in use, or this machine has none like it.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sockets.append(listening := socket.socket(family, kind, protocol))
            _open(listening, address, backlog)
    except OSError:
        for listening in sockets:
            listening.close()
        raise
    return sockets


def _open(listening: socket.socket, address: Any, backlog: int) -> None:
    listening.setblocking(False)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listening.family == socket.AF_INET6:
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own
    listening.bind(address)
    listening.listen(backlog)
