"""What an operator signs to publish one epoch of rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attribution.eip712 import Domain, StructType, digest
from attribution.signing import Signer

EPOCH = StructType(
    "Epoch",
    (
        ("operator", "address"),
        ("epochId", "uint256"),
        ("root", "bytes32"),
        ("receiptsRoot", "bytes32"),
        ("leavesHash", "bytes32"),
        ("totalCumulative", "uint256"),
    ),
)


def rewards_domain(chain_id: int, rewards: str) -> Domain:
    """The domain of one AttributionRewards contract on one chain."""
    return Domain("OpenLoRA AttributionRewards", "1", chain_id, rewards)


@dataclass(frozen=True, slots=True)
class EpochStatement:
    """Roots and total of one epoch. Hashes are 32 bytes; `total_cumulative` is the sum of all entries, in wei."""

    operator: str
    epoch_id: int
    root: bytes
    receipts_root: bytes
    leaves_hash: bytes
    total_cumulative: int

    def message(self) -> dict[str, Any]:
        """The struct's fields under their Solidity names; hashes as 0x and hex digits."""
        return {
            "operator": self.operator,
            "epochId": self.epoch_id,
            "root": "0x" + self.root.hex(),
            "receiptsRoot": "0x" + self.receipts_root.hex(),
            "leavesHash": "0x" + self.leaves_hash.hex(),
            "totalCumulative": self.total_cumulative,
        }

    def digest(self, domain: Domain) -> bytes:
        """The 32 bytes the operator signs. Raises SignatureError when a field does not fit its type."""
        return digest(domain, EPOCH, self.message())

    def sign(self, domain: Domain, signer: Signer) -> bytes:
        """The operator's signature, 65 bytes."""
        return signer.sign_hash(self.digest(domain))
