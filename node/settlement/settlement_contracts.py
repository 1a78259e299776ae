"""The four contracts as typed questions and as calls to be sent. Amounts are wei of the payment token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eth_utils.address import to_checksum_address

from node.settlement.artifacts import CONTRACTS, artifact
from node.settlement.chain import BlockTag, Call, Chain, error_names
from node.settlement.rpc_errors import Revert

ERROR_STRING_SELECTOR = bytes.fromhex("08c379a0")
PANIC_SELECTOR = bytes.fromhex("4e487b71")


@dataclass(frozen=True, slots=True)
class ContractAddresses:
    """Where the contracts are; checksummed."""

    token: str
    rewards: str
    escrow: str
    registry: str


@dataclass(frozen=True, slots=True)
class EpochStatus:
    """A submitted epoch as the chain has it."""

    root: bytes
    total_cumulative_wei: int
    activates_at_s: int
    is_void: bool


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """A registered adapter as the chain has it."""

    manifest_hash: bytes
    base_id: bytes
    trainer: str
    version: int


@dataclass(frozen=True, slots=True)
class SignedVoucher:
    """What a payer promised: up to `cumulative_wei` to `operator`, until `deadline_s`."""

    payer: str
    operator: str
    cumulative_wei: int
    deadline_s: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class EpochSubmission:
    """One epoch, signed by the operator's key."""

    operator: str
    epoch_id: int
    root: bytes
    receipts_root: bytes
    leaves_hash: bytes
    total_cumulative_wei: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class ClaimEntry:
    """One payee's place in a root."""

    account: str
    cumulative_wei: int
    proof: tuple[bytes, ...]


class SettlementContracts:
    """Questions are answered at `latest` unless a block or tag is named.

    Args:
        chain: Where they are deployed.
        addresses: From the deployment or the settings.
    """

    def __init__(self, chain: Chain, addresses: ContractAddresses) -> None:
        self.chain, self.addresses = chain, addresses
        self._abi = {name: artifact(name).abi for name in CONTRACTS}
        self._error_names = error_names(*self._abi.values())

    def escrow_balance_wei(self, payer: str, tag: BlockTag = "latest") -> int:
        """What a payer has deposited and not yet been charged, thawing included."""
        return self._integer("UsageEscrow", "balanceOf", payer, tag=tag)

    def escrow_committed_wei(self, payer: str, tag: BlockTag = "latest") -> int:
        """The deposit that a payer cannot withdraw without notice: what credit may rest on."""
        return self._integer("UsageEscrow", "committedOf", payer, tag=tag)

    def collected_wei(self, payer: str, operator: str, tag: BlockTag = "latest") -> int:
        """Cumulative amount collected from a payer for an operator."""
        return self._integer("UsageEscrow", "collected", payer, operator, tag=tag)

    def funded_wei(self, operator: str, tag: BlockTag = "latest") -> int:
        """Cumulative amount an operator's payees can ever receive."""
        return self._integer("AttributionRewards", "funded", operator, tag=tag)

    def epoch_count(self, operator: str, tag: BlockTag = "latest") -> int:
        """Epochs submitted so far: the id that the next one must have."""
        return self._integer("AttributionRewards", "epochCount", operator, tag=tag)

    def epoch(self, operator: str, epoch_id: int, tag: BlockTag = "latest") -> EpochStatus | None:
        """One submitted epoch, or None when there is none with that id."""
        if epoch_id >= self.epoch_count(operator, tag):
            return None
        [[root, total, activates_at_s, is_void]] = self._read("AttributionRewards", "epochOf", operator, epoch_id, tag=tag)
        return EpochStatus(bytes(root), int(total), int(activates_at_s), bool(is_void))

    def challenge_delay_s(self) -> int:
        """Seconds between an epoch's submission and its first claim."""
        return self._integer("AttributionRewards", "CHALLENGE_DELAY")

    def claimed_wei(self, operator: str, account: str, tag: BlockTag = "latest") -> int:
        """Cumulative amount paid to an account out of an operator's rewards."""
        return self._integer("AttributionRewards", "claimed", operator, account, tag=tag)

    def token_balance_wei(self, account: str, tag: BlockTag = "latest") -> int:
        """Payment tokens an account holds."""
        return self._integer("TestToken", "balanceOf", account, tag=tag)

    def token_allowance_wei(self, owner: str, spender: str) -> int:
        """Payment tokens that `spender` may take from `owner`."""
        return self._integer("TestToken", "allowance", owner, spender)

    def adapter(self, adapter_id: bytes) -> AdapterStatus | None:
        """A registered adapter, or None."""
        [[manifest_hash, base_id, trainer, version, *_]] = self._read("AdapterRegistry", "adapterOf", adapter_id)
        if int(trainer, 16) == 0:
            return None
        return AdapterStatus(bytes(manifest_hash), bytes(base_id), to_checksum_address(trainer), int(version))

    def collect(self, voucher: SignedVoucher, cumulative_used_wei: int, operator_signature: bytes) -> Call:
        """Charge a payer up to `cumulative_used_wei` of a voucher and fund the operator's rewards with it."""
        fields = (
            to_checksum_address(voucher.payer),
            to_checksum_address(voucher.operator),
            voucher.cumulative_wei,
            voucher.deadline_s,
        )
        return self._call("UsageEscrow", "collect", fields, voucher.signature, cumulative_used_wei, operator_signature)

    def submit_epoch(self, epoch: EpochSubmission) -> Call:
        """Queue an epoch's root."""
        fields = (
            to_checksum_address(epoch.operator),
            epoch.epoch_id,
            epoch.root,
            epoch.receipts_root,
            epoch.leaves_hash,
            epoch.total_cumulative_wei,
        )
        return self._call("AttributionRewards", "submitEpoch", fields, epoch.signature)

    def claim(self, operator: str, epoch_id: int, entry: ClaimEntry) -> Call:
        """Pay one account what it has earned and not yet received."""
        account = to_checksum_address(entry.account)
        arguments = (to_checksum_address(operator), epoch_id, account, entry.cumulative_wei, list(entry.proof))
        return self._call("AttributionRewards", "claim", *arguments)

    def claim_many(self, operator: str, epoch_id: int, entries: Sequence[ClaimEntry]) -> Call:
        """Pay several accounts; those that have nothing to receive are passed over."""
        claims = [(to_checksum_address(entry.account), entry.cumulative_wei, list(entry.proof)) for entry in entries]
        return self._call("AttributionRewards", "claimMany", to_checksum_address(operator), epoch_id, claims)

    def register_adapter(
        self, adapter_id: bytes, manifest_hash: bytes, base_id: bytes, trainer: str, uri: str, trainer_signature: bytes
    ) -> Call:
        """Name an adapter's manifest, base and trainer on chain."""
        arguments = (adapter_id, manifest_hash, base_id, to_checksum_address(trainer), uri, trainer_signature)
        return self._call("AdapterRegistry", "register", *arguments)

    def deposit(self, payer: str, amount_wei: int) -> Call:
        """Move the sender's approved tokens into a payer's deposit."""
        return self._call("UsageEscrow", "deposit", to_checksum_address(payer), amount_wei)

    def approve(self, spender: str, amount_wei: int) -> Call:
        """Let `spender` take the sender's tokens."""
        return self._call("TestToken", "approve", to_checksum_address(spender), amount_wei)

    def mint(self, account: str, amount_wei: int) -> Call:
        """Make test tokens; the token's owner alone may."""
        return self._call("TestToken", "mint", to_checksum_address(account), amount_wei)

    def named(self, revert: Revert) -> Revert:
        """The same revert with the contract's own name for it."""
        selector = revert.data[:4]
        standard = {ERROR_STRING_SELECTOR: "Error", PANIC_SELECTOR: "Panic"}
        return Revert(self._error_names.get(selector, standard.get(selector, "")), revert.data)

    def _integer(self, contract: str, function: str, *arguments: Any, tag: BlockTag = "latest") -> int:
        [value] = self._read(contract, function, *arguments, tag=tag)
        return int(value)

    def _read(self, contract: str, function: str, *arguments: Any, tag: BlockTag = "latest") -> tuple[Any, ...]:
        checked = [to_checksum_address(item) if isinstance(item, str) else item for item in arguments]
        return self.chain.read(self._address(contract), self._abi[contract], function, *checked, tag=tag)

    def _call(self, contract: str, function: str, *arguments: Any) -> Call:
        return Call(self._address(contract), self.chain.encode(self._abi[contract], function, *arguments))

    def _address(self, contract: str) -> str:
        addresses = self.addresses
        return {
            "TestToken": addresses.token,
            "AttributionRewards": addresses.rewards,
            "UsageEscrow": addresses.escrow,
            "AdapterRegistry": addresses.registry,
        }[contract]
