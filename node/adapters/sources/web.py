"""The one door to foreign web servers: every address is checked, and the checked address is the one connected to.

Resolving a name twice is how a private address slips in (the second answer differs), so this door resolves once and connects to
what it saw; TLS still verifies the host's own name. It follows no redirect, asks for no compression, and reads no more than its
caller allows.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import urllib3
from urllib3.exceptions import HTTPError

from node.adapters.locations import Location
from node.errors import AdapterForbiddenError, AdapterUnavailableError

CHUNK_BYTES = 1 << 18
DEFAULT_PORTS = {"https": 443, "http": 80}
Resolve = Callable[[str, int], list[str]]


def resolve_host(host: str, port: int) -> list[str]:
    """Every address of a host, as text."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True, slots=True)
class WebAnswer:
    """An open answer. `headers` have lower-case names; `chunks` yields the body as it arrives."""

    status: int
    headers: Mapping[str, str]
    chunks: Callable[[], Iterator[bytes]]


class WebDoor:
    """Asks web servers.

    Args:
        timeout_s: Limit on connecting and on every single read.
        allows_private: Whether hosts may have addresses that are not on the public internet (the operator's own stores).
        resolve: Addresses of a host.
    """

    def __init__(self, timeout_s: float, *, allows_private: bool = False, resolve: Resolve = resolve_host) -> None:
        self._timeout = urllib3.Timeout(connect=timeout_s, read=timeout_s)
        self._allows_private = allows_private
        self._resolve = resolve

    @contextmanager
    def get(self, url: Location, headers: Mapping[str, str] | None = None) -> Iterator[WebAnswer]:
        """Ask for `url`; the connection closes on leaving.

        Raises:
            AdapterForbiddenError: source_forbidden. A private address, or a redirect.
            AdapterUnavailableError: The host cannot be found or reached, or the connection broke.
        """
        host, _, port_text = url.authority.partition(":")
        port = int(port_text) if port_text else DEFAULT_PORTS[url.scheme]
        pool = self._pool(url.scheme, host, port, self._address(host, port))
        try:
            answer = pool.request(
                "GET",
                f"/{url.path}",
                headers={"Host": url.authority, "Accept-Encoding": "identity", **(headers or {})},
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
            )
            if 300 <= answer.status < 400 and answer.status != 304:
                raise AdapterForbiddenError(f"{host} redirects elsewhere (status {answer.status}); name the final location")
            lower = {name.lower(): value for name, value in answer.headers.items()}
            yield WebAnswer(answer.status, lower, lambda: answer.stream(CHUNK_BYTES, decode_content=False))
        except (HTTPError, OSError) as error:
            raise AdapterUnavailableError(f"{host} did not answer completely; try again later", retry_after_s=10.0) from error
        finally:
            pool.close()

    def _address(self, host: str, port: int) -> str:
        try:
            addresses = self._resolve(host, port)
        except OSError as error:
            raise AdapterUnavailableError(f"host {host} cannot be found; try again later", retry_after_s=10.0) from error
        for address in addresses:
            if not self._allows_private and not _is_public(address):
                raise AdapterForbiddenError(f"host {host} has an address that is not on the public internet; it is not asked")
        if not addresses:
            raise AdapterUnavailableError(f"host {host} has no address; try again later", retry_after_s=10.0)
        return addresses[0]

    def _pool(self, scheme: str, host: str, port: int, address: str) -> urllib3.HTTPConnectionPool:
        if scheme == "https":
            return urllib3.HTTPSConnectionPool(
                address, port, timeout=self._timeout, maxsize=1, server_hostname=host, assert_hostname=host
            )
        return urllib3.HTTPConnectionPool(address, port, timeout=self._timeout, maxsize=1)


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return found.is_global and not found.is_multicast
