"""What a payer signs to pay, and what an operator signs to collect it from the escrow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attribution.eip712 import Domain, StructType, digest
from attribution.signing import Signer, recover

VOUCHER = StructType(
    "Voucher", (("payer", "address"), ("operator", "address"), ("cumulative", "uint256"), ("deadline", "uint64"))
)
COLLECTION = StructType("Collection", (("payer", "address"), ("operator", "address"), ("cumulativeUsed", "uint256")))


def escrow_domain(chain_id: int, escrow: str) -> Domain:
    """The domain of one UsageEscrow contract on one chain."""
    return Domain("OpenLoRA UsageEscrow", "1", chain_id, escrow)


@dataclass(frozen=True, slots=True)
class Voucher:
    """A payer's promise: "this operator may have collected up to `cumulative` wei from my deposit, until `deadline`".

    Cumulative, so that a newer voucher replaces all older ones and a replayed one pays nothing.
    `deadline` is in seconds since 1970, UTC.
    """

    payer: str
    operator: str
    cumulative: int
    deadline: int

    def message(self) -> dict[str, Any]:
        """The struct's fields under their Solidity names."""
        return {"payer": self.payer, "operator": self.operator, "cumulative": self.cumulative, "deadline": self.deadline}

    def digest(self, domain: Domain) -> bytes:
        """The 32 bytes the payer signs. Raises SignatureError when a field does not fit its type."""
        return digest(domain, VOUCHER, self.message())

    def sign(self, domain: Domain, signer: Signer) -> bytes:
        """The payer's signature, 65 bytes."""
        return signer.sign_hash(self.digest(domain))

    def signer_of(self, domain: Domain, signature: bytes) -> str:
        """Who signed it. Whether that is the payer is the caller's question. Raises SignatureError when nobody did."""
        return recover(self.digest(domain), signature)


@dataclass(frozen=True, slots=True)
class Collection:
    """An operator's statement: "of what this payer promised me, I have used `cumulative_used` wei so far"."""

    payer: str
    operator: str
    cumulative_used: int

    def message(self) -> dict[str, Any]:
        """The struct's fields under their Solidity names."""
        return {"payer": self.payer, "operator": self.operator, "cumulativeUsed": self.cumulative_used}

    def digest(self, domain: Domain) -> bytes:
        """The 32 bytes the operator signs. Raises SignatureError when a field does not fit its type."""
        return digest(domain, COLLECTION, self.message())

    def sign(self, domain: Domain, signer: Signer) -> bytes:
        """The operator's signature, 65 bytes."""
        return signer.sign_hash(self.digest(domain))
