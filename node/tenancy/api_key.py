"""An API key: what it looks like, what of it is kept, what it allows.

    olk_<id>_<secret>     id: 12 letters and digits, public; secret: 256 random bits

Only the SHA-256 digest of the whole key is kept. A slow hash would protect guessable secrets; these have 256 bits, so it would
only make every request slow. Keys that an operator brings in a file have no such form: their id is taken from their digest.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

ID_CHARS = 12
SECRET_BYTES = 32
MAX_KEY_CHARS = 512
_OWN_FORM = re.compile(r"olk_([a-z2-7]{12})_[A-Za-z0-9_-]{43}")


class Scope(StrEnum):
    """What a key may do."""

    INFERENCE = "inference"
    ADAPTERS_READ = "adapters:read"
    ADAPTERS_WRITE = "adapters:write"
    METRICS = "metrics"
    ADMIN = "admin"  # the operator's commands on the admin port; opens nothing on the public one


ALL_BUT_ADMIN = frozenset(Scope) - {Scope.ADMIN}


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is kept. Times are UTC milliseconds.

    Attributes:
        digest: SHA-256 of the key, 32 bytes.
        is_imported: From `server.api_keys_file`; a person may have thought it up.
    """

    key_id: str
    tenant: str
    digest: bytes = field(repr=False)
    scopes: frozenset[Scope]
    created_ms: int
    expires_ms: int | None = None
    revoked_ms: int | None = None
    is_imported: bool = False

    def is_valid(self, now_ms: int) -> bool:
        """Whether it opens anything now."""
        return self.revoked_ms is None and (self.expires_ms is None or now_ms < self.expires_ms)

    def state(self, now_ms: int) -> str:
        """One word for lists: valid, expired or revoked."""
        if self.revoked_ms is not None:
            return "revoked"
        return "valid" if self.is_valid(now_ms) else "expired"


def new_secret(random_bytes: Callable[[int], bytes]) -> str:
    """A fresh key, to be shown once."""
    key_id = base64.b32encode(random_bytes(8)).decode().lower()[:ID_CHARS]
    secret = base64.urlsafe_b64encode(random_bytes(SECRET_BYTES)).decode().rstrip("=")
    return f"olk_{key_id}_{secret}"


def digest_of(secret: str) -> bytes:
    """What is kept of a key. Longer text than any key may have is cut, so that hashing it costs no more than a key does."""
    return hashlib.sha256(secret[:MAX_KEY_CHARS].encode("utf-8", "surrogateescape")).digest()


def id_of(secret: str, digest: bytes) -> str:
    """Where to look a key up: its public part, or what its digest begins with when it has none."""
    found = _OWN_FORM.fullmatch(secret)
    return found[1] if found else f"file-{digest.hex()[:ID_CHARS]}"
