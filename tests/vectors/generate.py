"""Write the golden vectors: values every implementation of the signed and persistent formats must agree on.

    python tests/vectors/generate.py            rewrite the files beside this script
    python tests/vectors/generate.py --check    compare only; exit 1 when one differs

Keys are derived from fixed words and guard nothing. forge reads merkle.json and eip712.json, pytest reads all of them.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

from eth_utils import keccak, to_checksum_address

from attribution import canonical, epoch, merkle, receipt, record, registration, voucher
from attribution.digests import token_digest
from attribution.eip712 import Domain, StructType, digest, full_message
from attribution.fees import Contribution, Payees, Price, SplitPolicy, Tokens
from attribution.identity import TensorEntry, adapter_id
from attribution.money import split
from attribution.signing import LocalSigner
from attribution.treehash import LEAF_BYTES, tree_hash

HERE = Path(__file__).parent


def key(word: str) -> bytes:
    return keccak(text=f"openlora vector key {word}")


def account(word: str) -> str:
    return to_checksum_address(keccak(text=f"openlora vector account {word}")[12:])


def hashed(word: str) -> str:
    return keccak(text=f"openlora vector hash {word}").hex()


def hexed(data: bytes) -> str:
    return "0x" + data.hex()


def canonical_cases() -> dict[str, Any]:
    values = [
        {"b": 1, "a": [True, False, None, -7, 9007199254740991]},
        {"\u20ac": "Euro", "\r": "control", "\ufb33": "Hebrew", "1": "digit", "\U0001f600": "emoji", "\u0080": "high"},
        'quotes " and \\ and \u0000\u0008\u0009\u000a\u000c\u000d\u001f\u007f / é',
        [],
        {"nested": {"z": {}, "y": [[], [1, [2, [3]]]]}},
    ]
    return {
        "cases": [
            {"value": value, "utf8_hex": canonical.dumps(value).hex(), "sha256": canonical.digest(value)} for value in values
        ]
    }


def identity_cases() -> dict[str, Any]:
    def tensor(name: str, rows: int, columns: int) -> tuple[dict[str, Any], TensorEntry]:
        data = b"".join(struct.pack("<f", (index * 37 % 101) / 8 - 6) for index in range(rows * columns))
        entry = TensorEntry(name, "F32", (rows, columns), lambda: data)
        return {"name": name, "dtype": "F32", "shape": [rows, columns], "data_hex": data.hex()}, entry

    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = [tensor(f"{prefix}.lora_B.weight", 4, 2), tensor(f"{prefix}.lora_A.weight", 2, 4)]
    configs = [
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
        {"peft_type": "LORA", "r": 2, "lora_alpha": 0.5, "use_rslora": True, "rank_pattern": {"k_proj": 1, "q_proj": 2}},
    ]
    adapters = [
        {"config": config, "tensors": [shown for shown, _ in tensors], "adapter_id": adapter_id([e for _, e in tensors], config)}
        for config in configs
    ]
    more = [
        tensor("base_model.model.model.embed_tokens.lora_embedding_A", 2, 5),
        tensor("base_model.model.model.embed_tokens.lora_embedding_B", 4, 2),
        tensor(f"{prefix}.lora_magnitude_vector", 1, 4),
    ]
    dora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": True}
    both = [*tensors, *more]
    adapters.append(
        {"config": dora, "tensors": [shown for shown, _ in both], "adapter_id": adapter_id([entry for _, entry in both], dora)}
    )
    lengths = [0, 1, 1000, LEAF_BYTES, LEAF_BYTES + 1, 3 * LEAF_BYTES + 5]
    trees = [
        {"length_bytes": n, "byte_at": "i*31 mod 251", "root": tree_hash(bytes(i * 31 % 251 for i in range(n)))} for n in lengths
    ]
    return {"trees": trees, "adapters": adapters}


def merkle_trees() -> dict[str, Any]:
    trees = []
    for index, count in enumerate((1, 2, 3, 4, 5, 7, 8, 33)):
        domain = merkle.TreeDomain((31337, 161201, 1612)[index % 3], account(f"rewards {index}"), account(f"operator {index}"))
        amounts = {account(f"payee {index} {i}"): (i * 10**17 + i**5 + 1) if i else (2**96 - 1) for i in range(count)}
        tree = merkle.Tree(domain, amounts)
        entries = [
            {"account": who, "cumulative": str(total), "leaf": hexed(leaf), "proof": [hexed(node) for node in tree.proof(who)]}
            for (who, total), leaf in zip(tree.entries, tree.leaves, strict=True)
        ]
        trees.append(
            {
                "chain_id": domain.chain_id,
                "rewards": domain.rewards,
                "operator": domain.operator,
                "root": hexed(tree.root),
                "leaves_hash": hexed(tree.leaves_hash()),
                "total": str(tree.total_wei),
                "entries": entries,
            }
        )
    records = [hashed(f"record {i}") for i in range(5)]
    proofs = [[hexed(node) for node in merkle.records_proof(records, i)] for i in range(5)]
    return {"trees": trees, "records": {"hashes": records, "root": hexed(merkle.records_root(records)), "proofs": proofs}}


def eip712_cases() -> dict[str, Any]:
    payer, operator = LocalSigner(key("payer")), LocalSigner(key("operator"))
    escrow = voucher.escrow_domain(31337, account("escrow"))
    rewards = epoch.rewards_domain(161201, account("rewards"))
    roots = [bytes.fromhex(hashed(word)) for word in ("root", "receipts root", "leaves")]
    promise = voucher.Voucher(payer.address, operator.address, 123_456_789_000_000_000, 1_893_456_000)
    largest = voucher.Voucher(payer.address, operator.address, 2**256 - 1, 2**64 - 1)
    used = voucher.Collection(payer.address, operator.address, 42_000_000_000)
    statement = epoch.EpochStatement(operator.address, 7, *roots, 10**21)
    registry = registration.registry_domain(1612, account("registry"))
    adapter, manifest, base = (hashed(word) for word in ("adapter", "manifest", "base"))
    uri = "https://example.org/manifests/é.json"
    named, nowhere = (registration.Registration(adapter, manifest, base, operator.address, where) for where in (uri, ""))
    served = sample_record()
    cases = [
        ("voucher", escrow, voucher.VOUCHER, promise.message(), "payer"),
        ("voucher_largest", escrow, voucher.VOUCHER, largest.message(), "payer"),
        ("collection", escrow, voucher.COLLECTION, used.message(), "operator"),
        ("epoch", rewards, epoch.EPOCH, statement.message(), "operator"),
        ("adapter", registry, registration.ADAPTER, named.message(), "operator"),
        ("adapter_empty_uri", registry, registration.ADAPTER, nowhere.message(), "operator"),
        ("receipt", receipt.receipt_domain(1612), receipt.RECEIPT, receipt.message_of(served, served.record_hash()), "operator"),
    ]
    return {"cases": [eip712_case(*case) for case in cases]}


def eip712_case(name: str, domain: Domain, kind: StructType, message: dict[str, Any], word: str) -> dict[str, Any]:
    signer = LocalSigner(key(word))
    typed = full_message(domain, kind, message)
    kinds = dict(kind.fields)
    shown = {field: str(value) if kinds[field] == "uint256" else value for field, value in message.items()}
    return {
        "name": name,
        "domain": typed["domain"],
        "primary_type": typed["primaryType"],
        "types": typed["types"],
        "message": shown,
        "digest": hexed(digest(domain, kind, message)),
        "signer": signer.address,
        "private_key": hexed(key(word)),
        "signature": hexed(signer.sign_hash(digest(domain, kind, message))),
    }


def split_cases() -> dict[str, Any]:
    cases = [
        (0, {"a": 1}),
        (1, {"a": 1, "b": 1, "c": 1}),
        (100, {"a": 1, "b": 1, "c": 1}),
        (2**96 - 1, {"a": 500_000, "b": 200_000, "c": 300_000}),
        (10, {"a": 0, "b": 3, "c": 0}),
        (999_999_999_999_999_999, {f"id{i}": i + 1 for i in range(40)}),
        (7, {f"id{i}": 1 for i in range(11)}),
    ]
    shown = []
    for total, weights in cases:
        tie = keccak(text=f"tie {total}")
        amounts = split(total, weights, tie)
        shares = [{"id": name, "weight": str(weights[name]), "amount": str(amounts[name])} for name in weights]
        shown.append({"total": str(total), "tie": hexed(tie), "shares": shares})
    return {"cases": shown}


def sample_facts(**changes: Any) -> record.Facts:
    """A request served by two adapters, one of them without a manifest."""
    operator = LocalSigner(key("operator")).address
    makers = tuple(sorted(((account("maker 1"), 333_333), (account("maker 2"), 666_667))))
    values: dict[str, Any] = {
        "request_id": "req-0001",
        "admitted_ms": 1_700_000_000_000,
        "finished_ms": 1_700_000_001_234,
        "status": "ok",
        "finish_reason": "stop",
        "base_id": hashed("base"),
        "operator": operator,
        "payer": LocalSigner(key("payer")).address,
        "voucher_digest": hashed("voucher"),
        "tenant_digest": hashed("tenant"),
        "terms": (record.RecipeTerm(hashed("a1"), hashed("m1"), "0.7"), record.RecipeTerm(hashed("a2"), None, "-0.35")),
        "contributions": (Contribution(hashed("a1"), account("trainer"), makers),),
        "tokens": Tokens(17, 16, 41),
        "price": Price("1000000000", "3000000001"),
        "policy": SplitPolicy(500_000, 200_000, 300_000),
        "payees": Payees(account("payout"), account("reserve")),
        "prompt_digest": token_digest(bytes(32), [[1, 2, 3]]),
        "output_digest": token_digest(bytes(range(32)), [[4, 5], [6]]),
    }
    return record.Facts(**{**values, **changes})


def sample_record() -> record.Record:
    return record.build(sample_facts(), sequence=1, previous_hash=record.GENESIS_HASH)


def record_chain() -> dict[str, Any]:
    changes: list[dict[str, Any]] = [
        {},
        {"request_id": "req-0002", "terms": (), "contributions": ()},
        {"request_id": "req-0003", "status": "cancelled", "finish_reason": "cancelled", "tokens": Tokens(17, 0, 3)},
        {"request_id": "req-0004", "status": "failed", "finish_reason": "error"},
        {"request_id": "req-0005", "payer": None, "voucher_digest": None, "tokens": Tokens(1, 0, 1)},
        {"request_id": "req-0006", "merge": record.Merge("ties", "0.5", "total")},
        {"request_id": "req-0007", "merge": record.Merge("linear_factors")},
    ]
    previous, shown = record.GENESIS_HASH, []
    signer, domain = LocalSigner(key("operator")), receipt.receipt_domain(31337)
    salts = receipt.Salts(bytes(32), bytes(range(32)))
    bundle: dict[str, Any] = {}
    for index, change in enumerate(changes):
        built = record.build(sample_facts(**change), sequence=index + 1, previous_hash=previous)
        previous = built.record_hash()
        shown.append({"record": json.loads(built.to_bytes()), "record_hash": previous})
        if index == 0:
            signature = receipt.sign(built, previous, domain, signer)
            bundle = receipt.bundle(built, previous, 31337, signer.address, signature, salts)
    return {"chain": shown, "bundle": bundle, "prompt_ids": [[1, 2, 3]], "output_ids": [[4, 5], [6]]}


FILES = {
    "canonical.json": canonical_cases,
    "identity.json": identity_cases,
    "merkle.json": merkle_trees,
    "eip712.json": eip712_cases,
    "split.json": split_cases,
    "record.json": record_chain,
}


def main(arguments: list[str]) -> int:
    stale = []
    for name, make in FILES.items():
        text = json.dumps(make(), indent=1) + "\n"
        path = HERE / name
        if path.exists() and path.read_text() == text:
            continue
        stale.append(name)
        if "--check" not in arguments:
            path.write_text(text)
    word = "differ" if "--check" in arguments else "written"
    sys.stdout.write(f"{word}: {', '.join(stale)}\n" if stale else "unchanged\n")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
