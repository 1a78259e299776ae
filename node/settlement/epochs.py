"""Closing epochs: what was served and paid for becomes one root on the chain, and proofs for everyone in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from attribution import merkle
from attribution.epoch import EpochStatement, rewards_domain
from attribution.errors import MerkleError
from attribution.signing import Signer, checksum_address
from attribution.voucher import Collection, escrow_domain
from node.errors import ChainError
from node.settlement.intents import INTENTS, IntentWriter
from node.settlement.ledger import Ledger
from node.settlement.ledger_epochs import (
    EpochReads,
    Ledgered,
    Plan,
    SettlementPlace,
    collectable_wei,
    done_epochs,
    epoch_tree,
    plan_epoch,
    read_ledgered,
    write_epoch,
)
from node.settlement.ledger_reads import LedgerReads
from node.settlement.settlement_contracts import ClaimEntry
from node.settlement.tables import EPOCHS

MAX_CLAIM_EPOCHS = 32


@dataclass(frozen=True, slots=True)
class EpochSummary:
    """One epoch as it was closed; `state` is its intent's: pending, done or failed."""

    serial: int
    epoch_id: int
    root: str
    receipts_root: str
    leaves_hash: str
    total_wei: int
    record_count: int
    closed_ms: int
    intent_key: str
    state: str


@dataclass(frozen=True, slots=True)
class PayingEpoch:
    """The newest epoch that pays now, with the tree behind its root."""

    operator: str
    epoch_id: int
    tree: merkle.Tree

    def claim(self, account: str) -> ClaimEntry | None:
        """What AttributionRewards.claim needs, or None: totals are cumulative, so who is not in this tree is in no older one."""
        try:
            proof = tuple(self.tree.proof(account))
        except MerkleError:
            return None
        spelled = checksum_address(account, "account")
        return ClaimEntry(spelled, dict(self.tree.entries)[spelled], proof)


class EpochCloser:
    """Turns covered usage into epochs.

    Args:
        ledger: Open.
        signer: The operator's key.
        contracts: Questions to escrow and rewards.
        place: Chain, contracts and operator.
        submit_intent: `node.settlement.intents.submit_intent`.
        clock_ms: UTC milliseconds.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        signer: Signer,
        contracts: EpochReads,
        place: SettlementPlace,
        submit_intent: IntentWriter,
        clock_ms: Callable[[], int],
    ) -> None:
        self._ledger, self._signer, self._contracts, self._place = ledger, signer, contracts, place
        self._submit_intent, self._clock_ms = submit_intent, clock_ms
        self._closing = asyncio.Lock()

    async def close(self) -> EpochSummary | None:
        """Close an epoch over everything that is paid for and in none yet; None when there is nothing new.

        The epoch, its entries, its collections and its submission are written in one transaction. An epoch that never reaches
        the chain is harmless: the next one starts from the last that did.

        Raises:
            ChainError: epoch_pending while the last one is on its way; chain_unreachable and others from the chain.
            LedgerError: The ledger does not answer or commit, or belongs to another chain or operator.
        """
        async with self._closing:
            ledgered = await self._ledger.read(lambda reads: read_ledgered(reads, self._place))
            if ledgered.pending_key is not None:
                raise ChainError(
                    "the last epoch is still on its way to the chain; try again later", code="epoch_pending", retry_after_s=5.0
                )
            collected, limits = await asyncio.to_thread(self._limits, ledgered)
            plan = await self._ledger.read(lambda reads: plan_epoch(reads, ledgered, limits))
            if not plan.records:
                return None
            tree, epoch_id = await asyncio.to_thread(self._tree, plan, collected)
            return await self._ledger.transact(lambda c: self._write(c, ledgered, plan, tree, epoch_id, collected))

    async def paying_epoch(self) -> PayingEpoch | None:
        """The newest epoch that is on the chain, past its challenge delay and not void, or None.

        Raises:
            ChainError: The chain cannot be asked. LedgerError: The ledger cannot be read.
        """
        for row in await self._ledger.read(lambda reads: done_epochs(reads, MAX_CLAIM_EPOCHS)):
            if await asyncio.to_thread(self._is_paying, row):
                tree = await self._ledger.read(lambda reads, row=row: epoch_tree(reads, row))  # type: ignore[misc]
                return PayingEpoch(row.operator, row.epoch_id, tree)
        return None

    async def epochs(self, limit: int = 100) -> list[EpochSummary]:
        """Closed epochs, newest first."""
        return await self._ledger.read(lambda reads: list_epochs(reads, limit))

    def _limits(self, ledgered: Ledgered) -> tuple[dict[str, int], dict[str, int]]:
        """What is collected, and what can be, from every payer with usage that no epoch covers."""
        collected, limits = {}, {}
        for payer, voucher in ledgered.vouchers.items():
            covered = ledgered.payers.get(payer)
            if ledgered.used_wei[payer] > (0 if covered is None else covered.used_wei):
                now_s = self._clock_ms() / 1000
                collected[payer], limits[payer] = collectable_wei(self._contracts, voucher, self._place.operator, now_s)
        return collected, limits

    def _tree(self, plan: Plan, collected: dict[str, int]) -> tuple[merkle.Tree, int]:
        """The tree and its place in the contract's queue; refused when the escrow could not pay for it."""
        tree = merkle.Tree(self._place.tree, plan.totals)
        coming = sum(max(0, plan.payers[payer].used_wei - before) for payer, before in collected.items() if payer in plan.payers)
        funded = self._contracts.funded_wei(self._place.operator) + coming
        if tree.total_wei > funded:
            raise ChainError(
                f"the epoch would allocate {tree.total_wei} wei, but only {funded} were or can be collected; "
                "the ledger and the escrow disagree about earlier epochs",
                code="epoch_unfunded",
            )
        return tree, self._contracts.epoch_count(self._place.operator)

    def _write(
        self, connection: Connection, ledgered: Ledgered, plan: Plan, tree: merkle.Tree, epoch_id: int, collected: dict[str, int]
    ) -> EpochSummary:
        """Sign and store everything, in the caller's transaction."""
        place, serial, now_ms = self._place, ledgered.next_serial, self._clock_ms()
        receipts_root = merkle.records_root([record_hash for _, record_hash in plan.records])
        statement = EpochStatement(place.operator, epoch_id, tree.root, receipts_root, tree.leaves_hash(), tree.total_wei)
        key = f"epoch:{place.chain_id}:{serial}"
        collections = [
            self._collect(connection, serial, ledgered, plan, payer, now_ms)
            for payer, before in collected.items()
            if payer in plan.payers and plan.payers[payer].used_wei > before
        ]
        epoch: dict[str, Any] = {
            "serial": serial,
            "epoch_id": epoch_id,
            "root": tree.root.hex(),
            "receipts_root": receipts_root.hex(),
            "leaves_hash": statement.leaves_hash.hex(),
            "total_wei": tree.total_wei,
            "record_count": len(plan.records),
            "closed_ms": now_ms,
            "intent_key": key,
        }
        where = {"chain_id": place.chain_id, "rewards": place.rewards, "operator": place.operator}
        write_epoch(connection, {**epoch, **where}, tree, plan.payers)
        signature = statement.sign(rewards_domain(place.chain_id, place.rewards), self._signer)
        payload = {
            "operator": place.operator,
            "epoch_id": epoch_id,
            "root": "0x" + tree.root.hex(),
            "receipts_root": "0x" + receipts_root.hex(),
            "leaves_hash": "0x" + statement.leaves_hash.hex(),
            "total_cumulative": str(tree.total_wei),
            "operator_signature": "0x" + signature.hex(),
        }
        self._submit_intent(connection, "submit_epoch", key, payload, after=collections, created_ms=now_ms)
        return EpochSummary(**epoch, state="pending")

    def _collect(self, connection: Connection, serial: int, ledgered: Ledgered, plan: Plan, payer: str, now_ms: int) -> str:
        """Hand over one payer's collection; its key."""
        place, voucher, used_wei = self._place, ledgered.vouchers[payer], plan.payers[payer].used_wei
        key = f"collect:{place.chain_id}:{serial}:{payer}"
        signature = Collection(payer, place.operator, used_wei).sign(escrow_domain(place.chain_id, place.escrow), self._signer)
        payload = {
            "payer": payer,
            "operator": place.operator,
            "cumulative": str(voucher.cumulative_wei),
            "deadline": voucher.deadline,
            "payer_signature": "0x" + voucher.signature.hex(),
            "cumulative_used": str(used_wei),
            "operator_signature": "0x" + signature.hex(),
        }
        self._submit_intent(connection, "collect", key, payload, created_ms=now_ms)
        return key

    def _is_paying(self, row: Any) -> bool:
        status = self._contracts.epoch(row.operator, row.epoch_id)
        if status is None or status.root.hex() != row.root or status.is_void:
            return False
        return bool(status.activates_at_s * 1000 <= self._clock_ms())


def list_epochs(reads: LedgerReads, limit: int = 100) -> list[EpochSummary]:
    """Closed epochs with the state of their submission, newest first. For the command line too."""
    columns = [EPOCHS.c[name] for name in EpochSummary.__slots__ if name != "state"]
    joined = select(*columns, INTENTS.c.state).join(INTENTS, INTENTS.c.key == EPOCHS.c.intent_key)
    return [EpochSummary(**row._mapping) for row in reads.rows(joined.order_by(EPOCHS.c.serial.desc()).limit(limit))]
