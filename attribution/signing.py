"""Signatures over EIP-712 digests: who can make one, and who made one."""

from __future__ import annotations

from typing import Protocol

from eth_keys.datatypes import PrivateKey, Signature
from eth_keys.exceptions import BadSignature
from eth_utils.address import to_checksum_address
from eth_utils.exceptions import ValidationError

from attribution.eip712 import fixed_bytes
from attribution.errors import SignatureError

_HALF_ORDER = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0


class Signer(Protocol):
    """A key somewhere: in this process, in a keystore, behind a remote signer."""

    @property
    def address(self) -> str:
        """The signer's address, 0x and 40 hex digits."""

    def sign_hash(self, digest: bytes) -> bytes:
        """65 bytes (r, s, v with v 27 or 28) over a 32-byte digest that is already bound to its domain."""


class LocalSigner:
    """A key in this process. Its digits appear in no repr, log or error.

    Args:
        private_key: 32 bytes.
    """

    def __init__(self, private_key: bytes) -> None:
        try:
            self._key = PrivateKey(private_key)
        except ValidationError as error:
            raise SignatureError("a private key has 32 bytes and lies between 1 and the order of secp256k1") from error
        self.address: str = self._key.public_key.to_checksum_address()

    def __repr__(self) -> str:
        return f"LocalSigner({self.address})"

    def sign_hash(self, digest: bytes) -> bytes:
        """Sign with RFC 6979 nonces: the same digest gives the same signature. About 30 us with coincurve installed."""
        raw = self._key.sign_msg_hash(digest).to_bytes()
        return raw[:64] + bytes([raw[64] + 27])


def recover(digest: bytes, signature: bytes) -> str:
    """Address that signed `digest`, in EIP-55 spelling.

    Raises:
        SignatureError: Not 65 bytes, v other than 27 or 28, s in the upper half (malleable, EIP-2), or no such point.
    """
    if len(signature) != 65:
        raise SignatureError(f"the signature has {len(signature)} bytes; it must have 65 (r, s, v)")
    r, s, v = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:64], "big"), signature[64]
    if v not in (27, 28):
        raise SignatureError(f"the signature ends in v = {v}; it must be 27 or 28")
    if s > _HALF_ORDER:
        raise SignatureError("the signature's s is in the upper half of the order; contracts refuse it as malleable")
    try:
        return Signature(vrs=(v - 27, r, s)).recover_public_key_from_msg_hash(digest).to_checksum_address()
    except (BadSignature, ValidationError) as error:
        raise SignatureError("the signature belongs to no key; it is damaged or made for other data") from error


def checksum_address(value: str, where: str) -> str:
    """`value` in EIP-55 spelling, so that one account has one spelling everywhere.

    Raises:
        SignatureError: Not 0x and 40 hex digits.
    """
    return to_checksum_address(fixed_bytes(value, 20, where))
