"""Salted digests of token ids: they bind a receipt to a prompt and an answer without revealing either.

Token ids of a short prompt can be guessed, so each digest has its own 32-byte salt. The salts go to the client with the
receipt and never into the public record; whoever holds prompt, answer and salts can prove what was asked and answered.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from attribution.errors import RecordError

SALT_BYTES = 32


def token_digest(salt: bytes, sequences: Sequence[Sequence[int]]) -> str:
    """SHA-256 over the salt, the number of sequences, and each sequence's length and ids as 4-byte big-endian numbers.

    Args:
        salt: 32 random bytes.
        sequences: Token ids; one sequence for a prompt, one for each choice of an answer.

    Returns:
        64 hex digits.

    Raises:
        ValueError: The salt has another length. RecordError: A token id outside 0..2**32-1.
    """
    if len(salt) != SALT_BYTES:
        raise ValueError(f"the salt has {len(salt)} bytes; it must have {SALT_BYTES}")
    state = hashlib.sha256(b"openlora.tokens/1\x00" + salt + len(sequences).to_bytes(4, "big"))
    for ids in sequences:
        state.update(len(ids).to_bytes(4, "big"))
        state.update(_big_endian(ids))
    return state.hexdigest()


def tenant_digest(tenant: str, salt: bytes) -> str:
    """A stable stand-in for a tenant's name, 64 hex digits; the salt is the node's secret, so names cannot be guessed."""
    return hashlib.sha256(b"openlora.tenant/1\x00" + salt + tenant.encode()).hexdigest()


def _big_endian(ids: Sequence[int]) -> bytes:
    try:
        return struct.pack(f">{len(ids)}I", *ids)
    except struct.error as error:
        raise RecordError("a token id is not an integer from 0 to 2**32 - 1") from error
