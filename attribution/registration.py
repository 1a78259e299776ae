"""What a trainer signs so that anyone may register the trainer's adapter on chain, and pay the gas for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attribution.eip712 import Domain, StructType, digest
from attribution.signing import Signer, recover

ADAPTER = StructType(
    "Adapter",
    (
        ("adapterId", "bytes32"),
        ("manifestHash", "bytes32"),
        ("baseId", "bytes32"),
        ("trainer", "address"),
        ("uri", "string"),
    ),
)


def registry_domain(chain_id: int, registry: str) -> Domain:
    """The domain of one AdapterRegistry contract on one chain."""
    return Domain("OpenLoRA AdapterRegistry", "1", chain_id, registry)


@dataclass(frozen=True, slots=True)
class Registration:
    """A trainer's claim: "this adapter of this base is mine, and this manifest says who made its data".

    The three hashes are 64 hex digits, as records name them; `uri` is where the manifest can be read.
    """

    adapter_id: str
    manifest_hash: str
    base_id: str
    trainer: str
    uri: str

    def message(self) -> dict[str, Any]:
        """The struct's fields under their Solidity names; hashes as 0x and hex digits."""
        return {
            "adapterId": "0x" + self.adapter_id,
            "manifestHash": "0x" + self.manifest_hash,
            "baseId": "0x" + self.base_id,
            "trainer": self.trainer,
            "uri": self.uri,
        }

    def digest(self, domain: Domain) -> bytes:
        """The 32 bytes the trainer signs. Raises SignatureError when a field does not fit its type."""
        return digest(domain, ADAPTER, self.message())

    def sign(self, domain: Domain, signer: Signer) -> bytes:
        """The trainer's signature, 65 bytes."""
        return signer.sign_hash(self.digest(domain))

    def signer_of(self, domain: Domain, signature: bytes) -> str:
        """Who signed it. Whether that is the trainer is the caller's question. Raises SignatureError when nobody did."""
        return recover(self.digest(domain), signature)
