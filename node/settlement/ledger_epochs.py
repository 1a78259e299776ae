"""What an epoch is made of: usage that payers signed for and can pay, added to the last epoch's totals.

Coverage: a payer's records enter in order, as long as their running sum stays within what was collected already or can be
collected now (voucher not expired, deposit still there). The first record beyond that stops this payer until it can pay.
So the sum of all totals never exceeds what the escrow hands over, and one empty deposit delays nobody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlalchemy import Connection, insert, select

from attribution import record
from attribution.merkle import Tree, TreeDomain
from node.errors import LedgerError
from node.settlement.admission import SignedVoucher
from node.settlement.intents import DONE, INTENTS
from node.settlement.ledger_reads import LedgerReads
from node.settlement.tables import EPOCH_ENTRIES, EPOCH_PAYERS, EPOCHS, PAYERS, RECORDS


class EpochReads(Protocol):
    """What epochs ask the contracts. Blocking; called on worker threads."""

    def escrow_balance_wei(self, payer: str) -> int:
        """Everything that can be collected from a payer now."""

    def collected_wei(self, payer: str, operator: str) -> int:
        """Cumulative amount collected from a payer for an operator."""

    def funded_wei(self, operator: str) -> int:
        """Cumulative amount the rewards contract received for an operator."""

    def epoch_count(self, operator: str) -> int:
        """The id the next epoch must have."""

    def epoch(self, operator: str, epoch_id: int) -> Any:
        """None, or an object with `root`, `activates_at_s` and `is_void`."""


@dataclass(frozen=True, slots=True)
class SettlementPlace:
    """Where an operator's usage is settled."""

    chain_id: int
    escrow: str
    rewards: str
    operator: str

    @property
    def tree(self) -> TreeDomain:
        """What the leaves are bound to."""
        return TreeDomain(self.chain_id, self.rewards, self.operator)


@dataclass(frozen=True, slots=True)
class PayerUse:
    """How much of a payer's usage an epoch covers, up to which record, and what was collected for it before."""

    used_wei: int
    last_sequence: int


@dataclass(slots=True)
class Ledgered:
    """What the ledger holds before an epoch closes: the last epoch that reached the chain, and everyone's promises."""

    next_serial: int = 1
    pending_key: str | None = None
    totals: dict[str, int] = field(default_factory=dict)
    payers: dict[str, PayerUse] = field(default_factory=dict)
    vouchers: dict[str, SignedVoucher] = field(default_factory=dict)
    used_wei: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Plan:
    """What the next epoch says: totals per payee, use per payer, and the records that are new in it."""

    totals: dict[str, int]
    payers: dict[str, PayerUse]
    records: list[tuple[int, str]] = field(default_factory=list)


def read_ledgered(reads: LedgerReads, place: SettlementPlace) -> Ledgered:
    """Read the last epochs and all payers.

    Raises:
        LedgerError: Earlier epochs of this ledger were settled somewhere else.
    """
    found = Ledgered()
    joined = select(EPOCHS, INTENTS.c.state).join(INTENTS, INTENTS.c.key == EPOCHS.c.intent_key).order_by(EPOCHS.c.serial.desc())
    rows = reads.rows(joined.limit(1))
    if rows:
        _check_place(rows[0], place)
        found.next_serial = rows[0].serial + 1
        found.pending_key = None if rows[0].state in (DONE, "failed") else rows[0].intent_key
    for base in reads.rows(joined.where(INTENTS.c.state == DONE).limit(1)):
        entries = reads.rows(select(EPOCH_ENTRIES).where(EPOCH_ENTRIES.c.serial == base.serial))
        found.totals = {row.account: row.cumulative_wei for row in entries}
        covered = reads.rows(select(EPOCH_PAYERS).where(EPOCH_PAYERS.c.serial == base.serial))
        found.payers = {row.payer: PayerUse(row.used_wei, row.last_sequence) for row in covered}
    for row in reads.rows(select(PAYERS)):
        found.vouchers[row.payer] = SignedVoucher(row.payer, row.operator, row.cumulative_wei, row.deadline, row.signature)
        found.used_wei[row.payer] = row.used_wei
    return found


def plan_epoch(reads: LedgerReads, ledgered: Ledgered, limits_wei: dict[str, int]) -> Plan:
    """Add the covered records of every payer to the last totals.

    Args:
        reads: Records.
        ledgered: From `read_ledgered`.
        limits_wei: The most that can have been collected from each payer once this epoch's collections are mined.
    """
    plan = Plan(dict(ledgered.totals), dict(ledgered.payers))
    for payer, limit_wei in limits_wei.items():
        use = plan.payers.get(payer, PayerUse(0, 0))
        query = select(RECORDS.c.sequence, RECORDS.c.record_hash, RECORDS.c.fee_wei, RECORDS.c.body)
        query = query.where(RECORDS.c.payer == payer, RECORDS.c.sequence > use.last_sequence, RECORDS.c.fee_wei != 0)
        for row in reads.rows(query.order_by(RECORDS.c.sequence)):
            if use.used_wei + row.fee_wei > limit_wei:
                break
            use = PayerUse(use.used_wei + row.fee_wei, row.sequence)
            plan.records.append((row.sequence, row.record_hash))
            for line in record.parse(row.body).split:
                plan.totals[line.account] = plan.totals.get(line.account, 0) + int(line.amount_wei)
        if use.last_sequence:
            plan.payers[payer] = use
    plan.records.sort()
    return plan


def write_epoch(connection: Connection, epoch: dict[str, object], tree: Tree, payers: dict[str, PayerUse]) -> None:
    """Store an epoch with its entries and payers inside the caller's transaction."""
    serial = epoch["serial"]
    connection.execute(insert(EPOCHS).values(**epoch))
    entries = [{"serial": serial, "account": account, "cumulative_wei": cumulative} for account, cumulative in tree.entries]
    connection.execute(insert(EPOCH_ENTRIES), entries)
    rows = [
        {"serial": serial, "payer": payer, "used_wei": use.used_wei, "last_sequence": use.last_sequence}
        for payer, use in payers.items()
    ]
    connection.execute(insert(EPOCH_PAYERS), rows)


def done_epochs(reads: LedgerReads, limit: int) -> Sequence[Any]:
    """The newest epochs that are on chain, newest first."""
    joined = select(EPOCHS).join(INTENTS, INTENTS.c.key == EPOCHS.c.intent_key).where(INTENTS.c.state == DONE)
    return reads.rows(joined.order_by(EPOCHS.c.serial.desc()).limit(limit))


def epoch_tree(reads: LedgerReads, row: Any) -> Tree:
    """Rebuild a stored epoch's tree.

    Raises:
        LedgerError: ledger_corrupt when its entries no longer give its root.
    """
    entries = reads.rows(select(EPOCH_ENTRIES).where(EPOCH_ENTRIES.c.serial == row.serial))
    tree = Tree(TreeDomain(row.chain_id, row.rewards, row.operator), {entry.account: entry.cumulative_wei for entry in entries})
    if tree.root.hex() != row.root:
        raise LedgerError(f"the entries of epoch {row.serial} no longer give its root; restore a backup", code="ledger_corrupt")
    return tree


def collectable_wei(contracts: EpochReads, voucher: SignedVoucher, operator: str, now_s: float) -> tuple[int, int]:
    """(what is collected, what can have been collected after one more collection), cumulative, of one payer."""
    collected = contracts.collected_wei(voucher.payer, operator)
    if voucher.deadline <= now_s:
        return collected, collected
    return collected, max(collected, min(voucher.cumulative_wei, collected + contracts.escrow_balance_wei(voucher.payer)))


def _check_place(row: Any, place: SettlementPlace) -> None:
    known = (row.chain_id, row.rewards, row.operator)
    if known != (place.chain_id, place.rewards, place.operator):
        raise LedgerError(
            f"this ledger settles as {row.operator} on chain {row.chain_id} with the rewards contract {row.rewards}; "
            "give another chain, contract or operator a data directory of its own"
        )
