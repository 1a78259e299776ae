"""The first block of a development chain: chain id, time and who has gas money."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from node.errors import ChainError

EMBEDDED_CHAIN_ID = 31_611  # below 2^31, since wallets and several libraries keep chain ids in 32 bits; in no public chain list
GAS_MONEY_WEI = 10**24


@dataclass(frozen=True, slots=True)
class Genesis:
    """What the whole history of a development chain follows from.

    Args:
        chain_id: EIP-155 chain id.
        timestamp_s: UTC seconds of block 0.
        alloc: Address (0x, lower case) to balance in wei.
    """

    chain_id: int
    timestamp_s: int
    alloc: Mapping[str, int]

    def balances(self) -> Iterator[tuple[bytes, int]]:
        """(20-byte address, wei), in address order so that the state root never depends on insertion order."""
        for address in sorted(self.alloc):
            yield bytes.fromhex(address.removeprefix("0x")), self.alloc[address]

    def to_bytes(self) -> bytes:
        """JSON with sorted keys; balances as decimal text."""
        alloc = {address: str(balance_wei) for address, balance_wei in self.alloc.items()}
        fields = {"alloc": alloc, "chain_id": self.chain_id, "timestamp_s": self.timestamp_s, "version": 1}
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Genesis:
        """Read what `to_bytes` wrote.

        Raises:
            ChainError: chain_corrupt, another version or malformed.
        """
        try:
            fields = json.loads(data)
            if fields["version"] != 1:
                raise ValueError(fields["version"])
            alloc = {str(address).lower(): int(balance_wei) for address, balance_wei in fields["alloc"].items()}
            return cls(int(fields["chain_id"]), int(fields["timestamp_s"]), alloc)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ChainError(
                "the development chain's genesis record is unreadable; restore the file or remove it to start a new chain",
                code="chain_corrupt",
            ) from error
