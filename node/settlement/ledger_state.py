"""What the ledger's writer knows by heart, and what one group of work would change about it.

The writer is alone, so its memory can stand in for reads of what it wrote itself. A group works on a `Group`; only when the
group has committed does it become part of `LedgerState`. A group that fails leaves no trace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import lru_cache

import msgspec
from sqlalchemy import Connection, bindparam, delete, insert, select, update

from attribution.record import GENESIS_HASH, Record
from node.settlement.admission import OpenRequest, SignedVoucher
from node.settlement.tables import EARNINGS, PAYERS, RECORDS, REQUESTS, USAGE

# Built once: finding a compiled statement takes SQLAlchemy microseconds, building one and seeing that it is known a millisecond.
_OPEN = insert(REQUESTS)
_CLOSE = delete(REQUESTS).where(REQUESTS.c.request_id == bindparam("gone"))
_RECORD = insert(RECORDS)
_INSERT_PAYER = insert(PAYERS)
_UPDATE_PAYER = update(PAYERS).where(PAYERS.c.payer == bindparam("key"))
_INSERT_EARNING = insert(EARNINGS)
_UPDATE_EARNING = update(EARNINGS).where(
    (EARNINGS.c.account == bindparam("k_account"))
    & (EARNINGS.c.adapter_id == bindparam("k_adapter"))
    & (EARNINGS.c.role == bindparam("k_role"))
)
_OF_DAY = (USAGE.c.tenant_digest == bindparam("k_digest")) & (USAGE.c.day == bindparam("k_day"))
_READ_USAGE = select(USAGE.c.tokens, USAGE.c.wei).where(_OF_DAY)
_INSERT_USAGE = insert(USAGE)
_UPDATE_USAGE = update(USAGE).where(_OF_DAY)

_DAY_MS = 86_400_000

EarningKey = tuple[str, str, str]  # account, adapter_id or "", role


class Earning(msgspec.Struct, frozen=True):
    """Sums of one account, adapter and role: over all usage, over usage that was signed for, and how many payments."""

    recorded_wei: int = 0
    payable_wei: int = 0
    count: int = 0


@dataclass(frozen=True, slots=True)
class PayerState:
    """What a payer has used, and the best voucher it signed."""

    used_wei: int
    voucher: SignedVoucher


@dataclass(slots=True)
class LedgerState:
    """The head of the chain, open requests, payers and earnings, as committed."""

    sequence: int = 0
    record_hash: str = GENESIS_HASH
    open_requests: dict[str, OpenRequest] = field(default_factory=dict)
    payers: dict[str, PayerState] = field(default_factory=dict)
    earnings: dict[EarningKey, Earning] = field(default_factory=dict)

    @classmethod
    def load(cls, connection: Connection) -> LedgerState:
        """Read it from the database."""
        state = cls()
        head = select(RECORDS.c.sequence, RECORDS.c.record_hash).order_by(RECORDS.c.sequence.desc()).limit(1)
        for row in connection.execute(head):
            state.sequence, state.record_hash = row.sequence, row.record_hash
        for row in connection.execute(select(REQUESTS)):
            state.open_requests[row.request_id] = OpenRequest.from_bytes(row.body)
        for row in connection.execute(select(PAYERS)):
            voucher = SignedVoucher(row.payer, row.operator, row.cumulative_wei, row.deadline, row.signature)
            state.payers[row.payer] = PayerState(row.used_wei, voucher)
        for row in connection.execute(select(EARNINGS)):
            key = (row.account, row.adapter_id, row.role)
            state.earnings[key] = Earning(row.recorded_wei, row.payable_wei, row.request_count)
        return state


class Group:
    """The changes of one commit, on top of a state that stays untouched until `merge`."""

    def __init__(self, state: LedgerState) -> None:
        self._state = state
        self.sequence = state.sequence
        self.record_hash = state.record_hash
        self._admitted: dict[str, OpenRequest] = {}
        self._closed: dict[str, OpenRequest] = {}
        self._payers: dict[str, PayerState] = {}
        self._earnings: dict[EarningKey, Earning] = {}
        self._usage: dict[tuple[str, str], tuple[int, int]] = {}  # (tenant digest, UTC day) -> (tokens, wei) of this group
        self._records: list[dict[str, object]] = []

    def admit(self, request: OpenRequest) -> None:
        """Open a request and keep its payer's voucher."""
        self._admitted[request.request_id] = request
        if request.voucher is not None:
            known = self._payer(request.voucher)
            self._payers[request.voucher.payer] = PayerState(known.used_wei, better(known.voucher, request.voucher))

    def open_request(self, request_id: str) -> OpenRequest | None:
        """An open request, one admitted in this same group included."""
        if request_id in self._closed:
            return None
        return self._admitted.get(request_id) or self._state.open_requests.get(request_id)

    def add(self, request: OpenRequest, record: Record, record_hash: str, row: dict[str, object]) -> None:
        """Append a record and everything that follows from it."""
        self.sequence, self.record_hash = record.sequence, record_hash
        self._closed[request.request_id] = request
        self._records.append(row)
        fee = int(record.fee_wei)
        if request.voucher is not None:
            known = self._payer(request.voucher)
            self._payers[request.voucher.payer] = PayerState(known.used_wei + fee, known.voucher)
        self._count_usage(record, fee)
        for line in record.split:
            key, amount = (line.account, line.adapter_id or "", line.role), int(line.amount_wei)
            old = self._earnings.get(key) or self._state.earnings.get(key) or Earning()
            payable = amount if request.voucher is not None else 0
            self._earnings[key] = Earning(old.recorded_wei + amount, old.payable_wei + payable, old.count + 1)

    def write(self, connection: Connection) -> None:
        """Send everything to the database, a statement for each kind of change."""
        opened = [
            {"request_id": key, "body": value.to_bytes()} for key, value in self._admitted.items() if key not in self._closed
        ]
        gone = [{"gone": key} for key in self._closed if key not in self._admitted]
        if opened:
            connection.execute(_OPEN, opened)
        if gone:
            connection.execute(_CLOSE, gone)
        if self._records:
            connection.execute(_RECORD, self._records)
        self._write_payers(connection)
        self._write_earnings(connection)
        self._write_usage(connection)

    def merge(self) -> None:
        """The group has committed: make it part of the state."""
        state = self._state
        state.sequence, state.record_hash = self.sequence, self.record_hash
        state.open_requests.update(self._admitted)
        for request_id in self._closed:
            del state.open_requests[request_id]
        state.payers.update(self._payers)
        state.earnings.update(self._earnings)

    def _count_usage(self, record: Record, fee: int) -> None:
        """What was delivered counts for the tenant's budget; what failed, or was given up before its first token, does not."""
        if record.status == "ok" or (record.status == "cancelled" and record.tokens.output):
            day = _day(record.finished_ms // _DAY_MS)
            tokens, wei = self._usage.get((record.tenant_digest, day), (0, 0))
            counted = record.tokens.prompt + record.tokens.output
            self._usage[record.tenant_digest, day] = (tokens + counted, wei + fee)

    def _payer(self, voucher: SignedVoucher) -> PayerState:
        return self._payers.get(voucher.payer) or self._state.payers.get(voucher.payer) or PayerState(0, voucher)

    def _write_payers(self, connection: Connection) -> None:
        fresh, known = [], []
        for payer, value in self._payers.items():
            row = {
                "used_wei": value.used_wei,
                "operator": value.voucher.operator,
                "cumulative_wei": value.voucher.cumulative_wei,
                "deadline": value.voucher.deadline,
                "signature": value.voucher.signature,
            }
            if payer in self._state.payers:
                known.append({**row, "key": payer})
            else:
                fresh.append({**row, "payer": payer})
        if fresh:
            connection.execute(_INSERT_PAYER, fresh)
        if known:
            connection.execute(_UPDATE_PAYER, known)

    def _write_earnings(self, connection: Connection) -> None:
        fresh, known = [], []
        for key, value in self._earnings.items():
            account, adapter_id, role = key
            sums = {"recorded_wei": value.recorded_wei, "payable_wei": value.payable_wei, "request_count": value.count}
            if key in self._state.earnings:
                known.append({**sums, "k_account": account, "k_adapter": adapter_id, "k_role": role})
            else:
                fresh.append({**sums, "account": account, "adapter_id": adapter_id, "role": role})
        if fresh:
            connection.execute(_INSERT_EARNING, fresh)
        if known:
            connection.execute(_UPDATE_EARNING, known)

    def _write_usage(self, connection: Connection) -> None:
        """Add to the sums in the database, which are read only at the start: no tenant stays in this process's memory."""
        for (digest, day), (tokens, wei) in self._usage.items():
            here = {"k_digest": digest, "k_day": day}
            known = connection.execute(_READ_USAGE, here).first()
            if known is None:
                fresh = {"tenant_digest": digest, "day": day, "tokens": tokens, "wei": wei}
                connection.execute(_INSERT_USAGE, fresh)
            else:
                connection.execute(_UPDATE_USAGE, {**here, "tokens": known.tokens + tokens, "wei": known.wei + wei})


@lru_cache(maxsize=2)
def _day(number: int) -> str:
    """A day of UTC, counted from 1970, as usage has it."""
    return (date(1970, 1, 1) + timedelta(days=number)).isoformat()


def better(old: SignedVoucher, new: SignedVoucher) -> SignedVoucher:
    """The voucher worth keeping: the larger promise, and of equal ones the longer."""
    return max(old, new, key=lambda voucher: (voucher.cumulative_wei, voucher.deadline))
