"""How a request must address a node that trusts this machine.

A foreign page may point its own name at 127.0.0.1 (DNS rebinding): to the browser this node is then that page's own site, and no
rule about origins holds. Only the name that the request was addressed to tells.
"""

from __future__ import annotations

from aiohttp import web

from node.config import LOOPBACK_HOSTS


def is_addressed_as_loopback(request: web.Request) -> bool:
    """Whether the Host header, which every browser sends, names this machine; true without one."""
    host = request.headers.get("Host", "localhost").lower()
    if host.startswith("["):
        return host[1:].partition("]")[0] in LOOPBACK_HOSTS
    return host.partition(":")[0] in LOOPBACK_HOSTS
