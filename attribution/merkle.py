"""Merkle trees that a contract can check: cumulative totals per account, and the records of an epoch.

Semantics:
    leaf    = keccak(keccak(abi.encode(uint256 chainId, address rewards, address operator, address account, uint256 cumulative)))
    parent  = keccak(min(left, right) | max(left, right)); an odd last node moves up unchanged
Entries are sorted by account, so one set of entries has one root. The double hash keeps leaves from being taken for nodes; chain,
contract and operator in the leaf keep a proof from being shown anywhere else. OpenZeppelin's MerkleProof verifies the proofs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eth_utils.crypto import keccak

from attribution.eip712 import fixed_bytes
from attribution.errors import MerkleError, SignatureError
from attribution.signing import checksum_address


@dataclass(frozen=True, slots=True)
class TreeDomain:
    """What every leaf is bound to."""

    chain_id: int
    rewards: str
    operator: str


def leaf_hash(domain: TreeDomain, account: str, cumulative_wei: int) -> bytes:
    """The leaf of one account, 32 bytes.

    Raises:
        MerkleError: A number outside uint256 or a malformed address.
    """
    try:
        words = [
            _uint(domain.chain_id, "chain_id"),
            *(fixed_bytes(value, 20, "address").rjust(32, b"\x00") for value in (domain.rewards, domain.operator, account)),
            _uint(cumulative_wei, "cumulative_wei"),
        ]
    except SignatureError as error:
        raise MerkleError(str(error)) from error
    return keccak(keccak(b"".join(words)))


class Tree:
    """Cumulative totals of one operator, as a sorted Merkle tree.

    Args:
        domain: Chain, rewards contract and operator.
        totals: Cumulative wei by account, in any order and any spelling of the addresses. Not empty.

    Raises:
        MerkleError: No entries, one account in two spellings, or a value that does not fit.
    """

    def __init__(self, domain: TreeDomain, totals: Mapping[str, int]) -> None:
        if not totals:
            raise MerkleError("an epoch without entries has no tree; do not close it")
        entries: dict[str, int] = {}
        for account, cumulative in totals.items():
            try:
                spelled = checksum_address(account, "account")
            except SignatureError as error:
                raise MerkleError(str(error)) from error
            if spelled in entries:
                raise MerkleError(f"account {spelled} occurs twice; every account has one cumulative total")
            entries[spelled] = cumulative
        self.entries: list[tuple[str, int]] = sorted(entries.items(), key=lambda entry: int(entry[0], 16))
        self._index = {account: index for index, (account, _) in enumerate(self.entries)}
        self._levels = _levels([leaf_hash(domain, account, cumulative) for account, cumulative in self.entries])

    @property
    def root(self) -> bytes:
        """The root, 32 bytes."""
        return self._levels[-1][0]

    @property
    def leaves(self) -> list[bytes]:
        """Leaf hashes in the order of `entries`."""
        return list(self._levels[0])

    @property
    def total_wei(self) -> int:
        """The sum of all cumulative totals."""
        return sum(cumulative for _, cumulative in self.entries)

    def proof(self, account: str) -> list[bytes]:
        """Siblings from the leaf to the root.

        Raises:
            MerkleError: The account has no entry.
        """
        try:
            index = self._index[checksum_address(account, "account")]
        except (KeyError, SignatureError) as error:
            raise MerkleError(f"account {account!r:.60} has no entry in this tree") from error
        return _proof(self._levels, index)

    def leaves_hash(self) -> bytes:
        """keccak over (20-byte account | 32-byte cumulative) of every entry in order: fixes the published list of leaves."""
        return keccak(b"".join(bytes.fromhex(a[2:]) + cumulative.to_bytes(32, "big") for a, cumulative in self.entries))


def verify(root: bytes, leaf: bytes, proof: Sequence[bytes]) -> bool:
    """Whether `proof` leads from `leaf` to `root`."""
    node = leaf
    for sibling in proof:
        node = _parent(node, sibling)
    return node == root


def record_leaf(record_hash: str) -> bytes:
    """The leaf of one record (64 hex digits) in the tree of an epoch's records."""
    return keccak(keccak(fixed_bytes("0x" + record_hash, 32, "record_hash")))


def records_root(record_hashes: Sequence[str]) -> bytes:
    """Root over an epoch's records in order of their sequence numbers. Not empty."""
    if not record_hashes:
        raise MerkleError("an epoch without records has no tree; do not close it")
    return _levels([record_leaf(record_hash) for record_hash in record_hashes])[-1][0]


def records_proof(record_hashes: Sequence[str], index: int) -> list[bytes]:
    """Siblings from record `index` to `records_root` of the same list."""
    if not 0 <= index < len(record_hashes):
        raise MerkleError(f"record index {index} is outside the epoch's {len(record_hashes)} records")
    return _proof(_levels([record_leaf(record_hash) for record_hash in record_hashes]), index)


def _levels(leaves: list[bytes]) -> list[list[bytes]]:
    levels = [leaves]
    while len(levels[-1]) > 1:
        level = levels[-1]
        paired = [_parent(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        levels.append(paired + level[len(level) - len(level) % 2 :])
    return levels


def _proof(levels: Sequence[Sequence[bytes]], index: int) -> list[bytes]:
    siblings = []
    for level in levels[:-1]:
        if index ^ 1 < len(level):
            siblings.append(level[index ^ 1])
        index //= 2
    return siblings


def _parent(left: bytes, right: bytes) -> bytes:
    return keccak(left + right if left <= right else right + left)


def _uint(value: int, name: str) -> bytes:
    if not 0 <= value < 1 << 256:
        raise MerkleError(f"{name} is {value}; it must fit in 256 bits")
    return value.to_bytes(32, "big")
