"""The door: from the Authorization header to a tenant, or to one and the same refusal."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass

from node.config import TenantSettings
from node.errors import AuthError, OverloadedError
from node.tenancy.api_key import ALL_BUT_ADMIN, MAX_KEY_CHARS, ApiKey, Scope, digest_of, id_of
from node.tenancy.guesses import MAX_GUESSES, WINDOW_S, Guesses
from node.tenancy.store import TenantStore
from node.tenancy.tenant import ANONYMOUS, Tenant, TenantTerms

_NO_DIGEST = bytes(32)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling. `key_id` is None for everybody on a node without keys."""

    tenant: Tenant
    scopes: frozenset[Scope]
    key_id: str | None = None


class Door:
    """Tells who calls.

    Args:
        store: Tenants and keys.
        defaults: Limits of tenants that have none of their own.
        clock: Monotonic seconds. clock_ms: UTC milliseconds.
    """

    def __init__(
        self, store: TenantStore, defaults: TenantSettings, clock: Callable[[], float], clock_ms: Callable[[], int]
    ) -> None:
        self._store = store
        self._defaults = defaults
        self._clock_ms = clock_ms
        self._guesses = Guesses(clock)

    @property
    def is_open(self) -> bool:
        """Whether this node never had a key: it then serves whoever reaches it (loopback, or `server.insecure`)."""
        return not self._store.has_keys

    def identify(self, authorization: list[str], address: str) -> Principal:
        """Who sends this request.

        Every refusal takes the same steps, one digest and one comparison in constant time, and has the same text, whatever was
        wrong. An address that guessed too often gets 429 for what is wrong and for keys that a person may have thought up;
        a generated key still opens, because nobody finds 256 bits, and a proxy's other callers are not to blame.

        Args:
            authorization: All Authorization headers of the request; exactly one is acceptable.
            address: Where the request came from.

        Raises:
            AuthError: No key, a wrong, an expired or a revoked one.
            OverloadedError: Too many wrong keys from this address.
        """
        if self.is_open:
            return Principal(TenantTerms(ANONYMOUS).under(self._defaults), ALL_BUT_ADMIN)
        blocked_s = self._guesses.blocked_s(address)
        key = self._match(bearer_token(authorization) or "")
        if blocked_s and (key is None or key.is_imported):
            raise OverloadedError(
                f"more than {MAX_GUESSES} wrong API keys from this address within {WINDOW_S:g} s; wait and use a valid key",
                code="rate_limit_exceeded",
                retry_after_s=blocked_s,
            )
        if key is None:
            self._guesses.count(address)
            raise AuthError("the API key is missing or wrong; send it as 'Authorization: Bearer KEY'")
        return Principal(self._store.terms(key.tenant).under(self._defaults), key.scopes, key.key_id)

    def _match(self, secret: str) -> ApiKey | None:
        digest = digest_of(secret)
        key = self._store.key(id_of(secret, digest))
        is_equal = hmac.compare_digest(_NO_DIGEST if key is None else key.digest, digest)
        is_valid = key is not None and key.is_valid(self._clock_ms()) and len(secret) <= MAX_KEY_CHARS
        return key if is_equal and is_valid else None


def bearer_token(authorization: list[str]) -> str | None:
    """The token of the one Authorization header; None for none, several, or another scheme."""
    if len(authorization) != 1:
        return None
    scheme, _, token = authorization[0].partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def check_scope(principal: Principal, wanted: frozenset[Scope]) -> None:
    """Whether the caller's key has one of the scopes that open a route.

    Raises:
        AuthError: insufficient_scope.
    """
    if not principal.scopes & wanted:
        names = " or ".join(sorted(wanted))
        raise AuthError(
            f"this API key has no right to do that; it needs the scope {names}: ask the node's operator",
            code="insufficient_scope",
        )
