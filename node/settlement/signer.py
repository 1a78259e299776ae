"""Who signs: an address and two ways to sign, wherever the key is kept."""

from __future__ import annotations

from typing import Any, Protocol

from coincurve import PrivateKey
from eth_account import Account
from eth_account.signers.local import LocalAccount


class Signer(Protocol):
    """What the node asks of a key. A remote signer implements the same three names."""

    @property
    def address(self) -> str:
        """Checksummed address."""

    def sign_transaction(self, transaction: dict[str, Any]) -> bytes:
        """A complete transaction (nonce, fees, gas, chainId, to, value, data) as signed raw bytes."""

    def sign_hash(self, digest: bytes) -> bytes:
        """65 bytes (r, s, v with v 27 or 28) over a 32-byte digest that is already domain-separated."""


class LocalSigner:
    """A key in this process's memory. Shows its address and nothing else."""

    __slots__ = ("_account", "_key")

    def __init__(self, private_key: bytes) -> None:
        self._account: LocalAccount = Account.from_key(private_key)
        self._key = PrivateKey(private_key)

    @property
    def address(self) -> str:
        """Checksummed address."""
        return str(self._account.address)

    def sign_transaction(self, transaction: dict[str, Any]) -> bytes:
        """See `Signer`."""
        return bytes(self._account.sign_transaction(transaction).raw_transaction)

    def sign_hash(self, digest: bytes) -> bytes:
        """See `Signer`."""
        if len(digest) != 32:
            raise ValueError(f"a digest has 32 bytes, not {len(digest)}")
        # Not through eth_keys, which derives the public key twice for each signature: twice the time of signing.
        raw = self._key.sign_recoverable(digest, hasher=None)
        return raw[:64] + bytes([27 + raw[64]])

    def __repr__(self) -> str:
        return f"LocalSigner({self.address})"

    def __reduce__(self) -> Any:
        raise TypeError("a signer is not copied to another process")
