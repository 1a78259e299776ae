"""The receipt: the operator's signature under one record, in a bundle that proves itself offline."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from attribution import record as records
from attribution.digests import SALT_BYTES, token_digest
from attribution.eip712 import Domain, StructType, digest, digest_of_hash, hashed
from attribution.errors import RecordError, SignatureError, Unauthenticated
from attribution.manifest import Manifest
from attribution.record import Record
from attribution.signing import Signer, checksum_address, recover

SCHEMA = "openlora.receipt/1"
ZERO_ADDRESS = "0x" + "0" * 40
_NO_HASH = "0" * 64
ZERO_HASH = "0x" + _NO_HASH
_ADDRESS_PAD = "0" * 24  # before the 40 digits of an address in a word
_HEX = re.compile(r"(0x)?([0-9a-f]{2})*")

RECEIPT = StructType(
    "Receipt",
    (
        ("recordHash", "bytes32"),
        ("requestId", "string"),
        ("promptDigest", "bytes32"),
        ("outputDigest", "bytes32"),
        ("baseId", "bytes32"),
        ("adapterIds", "bytes32[]"),
        ("manifestHashes", "bytes32[]"),
        ("payer", "address"),
        ("operator", "address"),
        ("admittedMs", "uint64"),
        ("finishedMs", "uint64"),
        ("finishReason", "string"),
        ("feeWei", "uint256"),
    ),
)


@dataclass(frozen=True, slots=True)
class Salts:
    """What turns token ids into the digests of a receipt: 32 bytes each, known to the node and the client only."""

    prompt: bytes
    output: bytes


@dataclass(frozen=True, slots=True)
class VerifiedReceipt:
    """A bundle that proved itself: the record inside it, its hash, the trusted signer and the chain it was signed for."""

    record: Record
    record_hash: str
    signer: str
    chain_id: int


def receipt_domain(chain_id: int) -> Domain:
    """The domain of receipts for one chain. No contract verifies them, so none is named."""
    return Domain("OpenLoRA Receipt", "1", chain_id)


def message_of(record: Record, record_hash: str) -> dict[str, Any]:
    """The struct that is signed. No payer is the zero address; an adapter without a manifest has a zero manifest hash."""
    adapters = record.recipe.adapters
    return {
        "recordHash": "0x" + record_hash,
        "requestId": record.request_id,
        "promptDigest": "0x" + record.prompt_digest,
        "outputDigest": "0x" + record.output_digest,
        "baseId": "0x" + record.base_id,
        "adapterIds": ["0x" + adapter.adapter_id for adapter in adapters],
        "manifestHashes": ["0x" + adapter.manifest_hash if adapter.manifest_hash else ZERO_HASH for adapter in adapters],
        "payer": record.payer or ZERO_ADDRESS,
        "operator": record.operator,
        "admittedMs": record.admitted_ms,
        "finishedMs": record.finished_ms,
        "finishReason": record.finish_reason,
        "feeWei": int(record.fee_wei),
    }


def sign(record: Record, record_hash: str, domain: Domain, signer: Signer) -> bytes:
    """The operator's signature under a record that `record.build` made, 65 bytes."""
    return signer.sign_hash(digest_of(record, record_hash, domain))


def digest_of(record: Record, record_hash: str, domain: Domain) -> bytes:
    """What is signed: the digest of `message_of`, straight from a record whose hashes and addresses were checked when it was
    built: 12 us instead of 20. A test holds both equal.

    Raises:
        SignatureError: A number that has no place in its field.
    """
    adapters = record.recipe.adapters
    try:
        words = (
            bytes.fromhex(record_hash),
            hashed(record.request_id.encode()),
            bytes.fromhex(record.prompt_digest + record.output_digest + record.base_id),
            hashed(bytes.fromhex("".join([adapter.adapter_id for adapter in adapters]))),
            hashed(bytes.fromhex("".join([adapter.manifest_hash or _NO_HASH for adapter in adapters]))),
            bytes.fromhex(_ADDRESS_PAD + (record.payer or ZERO_ADDRESS)[2:] + _ADDRESS_PAD + record.operator[2:]),
            record.admitted_ms.to_bytes(32, "big"),
            record.finished_ms.to_bytes(32, "big"),
            hashed(record.finish_reason.encode()),
            int(record.fee_wei).to_bytes(32, "big"),
        )
    except OverflowError:
        return digest(domain, RECEIPT, message_of(record, record_hash))  # says which
    return digest_of_hash(domain, RECEIPT.hash_of_words(words))


def bundle(record: Record, record_hash: str, chain_id: int, signer: str, signature: bytes, salts: Salts) -> dict[str, Any]:
    """Everything an offline verifier needs, as JSON. The fee is a decimal string because JSON integers end at 2**53."""
    plain = msgspec.json.decode(msgspec.json.encode(record))
    return _around(plain, record, record_hash, chain_id, signer, signature, salts)


def encoded_bundle(
    record: Record, body: bytes, record_hash: str, chain_id: int, signer: str, signature: bytes, salts: Salts
) -> bytes:
    """`bundle` as the bytes of its JSON, with the record's own canonical bytes `body` in it: half the work."""
    return msgspec.json.encode(_around(msgspec.Raw(body), record, record_hash, chain_id, signer, signature, salts))


def _around(
    shown: Any, record: Record, record_hash: str, chain_id: int, signer: str, signature: bytes, salts: Salts
) -> dict[str, Any]:
    message = message_of(record, record_hash)
    message["feeWei"] = record.fee_wei
    return {
        "schema": SCHEMA,
        "chain_id": chain_id,
        "receipt": message,
        "signer": signer,
        "signature": "0x" + signature.hex(),
        "record": shown,
        "salts": {"prompt": salts.prompt.hex(), "output": salts.output.hex()},
    }


def verify(value: Mapping[str, Any], trusted: Iterable[str], manifests: Sequence[Manifest] = ()) -> VerifiedReceipt:
    """Check a bundle with nothing but the bundle and the names of whom to trust.

    Semantics:
        Signer is trusted and made the signature; the receipt is what the record says; the record's hash, shares, fee and split
        are recomputed; the contributions agree with every given manifest that the record names.

    Args:
        value: The parsed bundle.
        trusted: Addresses of operators' receipt keys the caller trusts.
        manifests: Manifests to compare contributions with; those of other adapters are ignored.

    Raises:
        Unauthenticated: `trusted` is empty. SignatureError: Any other signer, or a malformed bundle.
        RecordError: Record and receipt, or the record's own parts, contradict each other.
    """
    domain, record, signature, signer = _read(value)
    records.verify(record)
    record_hash = record.record_hash()
    message = message_of(record, record_hash)
    if value["receipt"] != {**message, "feeWei": record.fee_wei}:
        raise RecordError("the receipt does not describe the record beside it; one of them was changed")
    actual = recover(digest(domain, RECEIPT, message), signature)
    if actual != signer:
        raise SignatureError(f"the bundle names signer {signer}, but the signature is not by that key")
    compare_manifests(record, manifests)
    accepted = {checksum_address(address, "trusted address") for address in trusted}
    if not accepted:
        raise Unauthenticated(
            f"unauthenticated: signed by {actual}, but no trusted signer was named; name the operator's address"
        )
    if actual not in accepted:
        raise SignatureError(f"the receipt is signed by {actual}, who is not trusted; trusted: {', '.join(sorted(accepted))}")
    if record.operator != actual:
        raise SignatureError(f"the record names operator {record.operator}, but {actual} signed it; nobody signs for another")
    return VerifiedReceipt(record, record_hash, actual, domain.chain_id)


def verify_tokens(value: Mapping[str, Any], prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> None:
    """Check that a verified bundle is about these token ids: the prompts sent and the choices received, in order.

    Raises:
        RecordError: Other prompts or other outputs. SignatureError: Malformed salts.
    """
    salts = value.get("salts")
    record = records.parse(value["record"])
    for name, sequences, expected in (("prompt", prompts, record.prompt_digest), ("output", outputs, record.output_digest)):
        salt = _hex(salts.get(name) if isinstance(salts, Mapping) else None, SALT_BYTES, f"salts.{name}")
        if token_digest(salt, sequences) != expected:
            raise RecordError(f"the receipt is not about this {name}: its digest differs from the record's {name}_digest")


def compare_manifests(record: Record, manifests: Sequence[Manifest]) -> None:
    """Check the record's contributions against the manifests it names.

    Raises:
        RecordError: A manifest with a hash the record names gives other makers or other shares.
    """
    by_hash = {manifest.manifest_hash(): manifest for manifest in manifests}
    makers = {maker.adapter_id: maker for maker in record.contributions}
    for adapter in record.recipe.adapters:
        manifest = by_hash.get(adapter.manifest_hash or "")
        if manifest is None:
            continue
        if manifest.contribution() != makers.get(adapter.adapter_id):
            raise RecordError(
                f"the contributions of adapter {adapter.adapter_id} differ from its manifest {adapter.manifest_hash}"
            )


def _read(value: Mapping[str, Any]) -> tuple[Domain, Record, bytes, str]:
    if not isinstance(value, Mapping) or value.get("schema") != SCHEMA:
        raise SignatureError(f"not a receipt bundle of schema {SCHEMA}")
    missing = {"chain_id", "receipt", "signer", "signature", "record"} - value.keys()
    if missing:
        raise SignatureError(f"the bundle has no {', '.join(sorted(missing))}; it is incomplete")
    chain_id = value["chain_id"]
    if not isinstance(chain_id, int) or isinstance(chain_id, bool):
        raise SignatureError(f"chain_id is {chain_id!r:.40}; it must be an integer")
    if not isinstance(value["record"], dict):
        raise SignatureError("the bundle's record is not a JSON object")
    signature = _hex(value["signature"], 65, "signature")
    return receipt_domain(chain_id), records.parse(value["record"]), signature, checksum_address(value["signer"], "signer")


def _hex(text: Any, count: int, where: str) -> bytes:
    matched = _HEX.fullmatch(text) if isinstance(text, str) else None
    if matched is None or len(text.removeprefix("0x")) != 2 * count:
        raise SignatureError(f"{where} is {text!r:.80}; it must have {2 * count} lower-case hex digits")
    return bytes.fromhex(text.removeprefix("0x"))
