"""The outbox's rows: short transactions, each of which leaves a state that a restart can go on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eth_utils.crypto import keccak
from sqlalchemy import Connection, Engine, func, insert, select, update

from node.settlement.chain import Call
from node.settlement.fees import Fees
from node.settlement.intents import DONE, FAILED, INTENTS, PENDING, finish_intent
from node.settlement.outbox_tables import (
    ABANDONED,
    ATTEMPTS,
    CONFIRMED,
    FINALIZED,
    IN_PROGRESS,
    LOST,
    OPEN_STATES,
    RECEIPTS,
    REVERTED,
    TXS,
    UNCONFIRMED,
)
from node.settlement.rpc_errors import SendOutcome
from node.settlement.rpc_values import TransactionReceipt

_MAYBE_SENT = (SendOutcome.ACCEPTED, SendOutcome.ALREADY_KNOWN, SendOutcome.UNKNOWN, SendOutcome.NONCE_TOO_LOW)


@dataclass(frozen=True, slots=True)
class Intent:
    """Something that must happen on chain exactly once."""

    key: str
    kind: str
    payload: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """What a transaction does and the gas it may use: everything but its nonce and fees."""

    call: Call
    gas: int

    def to_json(self) -> str:
        """Text for the `request` column."""
        call = self.call
        return json.dumps({"to": call.to, "data": call.data.hex(), "value_wei": str(call.value_wei), "gas": self.gas})

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        return cls(Call(fields["to"], bytes.fromhex(fields["data"]), int(fields["value_wei"])), int(fields["gas"]))


@dataclass(frozen=True, slots=True)
class Attempt:
    """One signed version of a transaction."""

    id: int
    raw: bytes
    hash: bytes
    fees: Fees
    created_ms: int
    sent_ms: int | None
    was_maybe_sent: bool


@dataclass(frozen=True, slots=True)
class OpenTx:
    """A transaction that is not final, with its versions, newest first."""

    id: int
    intent_key: str
    nonce: int
    state: str
    request: Request
    foreign_since_ms: int | None
    attempts: tuple[Attempt, ...]

    @property
    def newest(self) -> Attempt:
        """The version with the highest fees."""
        return self.attempts[0]


class OutboxStore:
    """Rows of one account on one chain.

    Args:
        engine: The ledger's database.
        chain: 0x hash of the chain's first block.
        account: Checksummed sender.
        now_ms: UTC clock.
    """

    def __init__(self, engine: Engine, chain: str, account: str, now_ms: Callable[[], int]) -> None:
        self._engine, self._chain, self._account, self._now_ms = engine, chain, account, now_ms

    def open_txs(self) -> list[OpenTx]:
        """Transactions that are not final, lowest nonce first."""
        with self._engine.begin() as connection:
            rows = connection.execute(
                select(TXS).where(self._is_mine(), TXS.c.state.in_(OPEN_STATES)).order_by(TXS.c.nonce)
            ).all()
            return [_open_tx(row, self._attempts(connection, row.id)) for row in rows]

    def ready_intents(self, limit: int) -> list[Intent]:
        """Pending intents without a transaction under way whose predecessors are done, oldest first.

        An intent whose predecessor failed is failed here: it can never be sent.
        """
        ready: list[Intent] = []
        with self._engine.begin() as connection:
            busy = select(TXS.c.intent_key).where(TXS.c.chain == self._chain, TXS.c.state.in_(OPEN_STATES))
            pending = select(INTENTS).where(INTENTS.c.state == PENDING, INTENTS.c.key.not_in(busy)).order_by(INTENTS.c.id)
            for row in connection.execute(pending).all():
                states = _states_of(connection, json.loads(row.after))
                if FAILED in states:
                    finish_intent(connection, row.key, FAILED, "predecessor_failed")
                elif all(state == DONE for state in states):
                    ready.append(Intent(row.key, row.kind, json.loads(row.payload)))
                if len(ready) == limit:
                    break
        return ready

    def intent(self, key: str) -> Intent | None:
        """One intent, whatever its state."""
        with self._engine.begin() as connection:
            row = connection.execute(select(INTENTS).where(INTENTS.c.key == key)).first()
        return None if row is None else Intent(row.key, row.kind, json.loads(row.payload))

    def is_spent(self, nonce: int) -> bool:
        """Whether a closed transaction of ours has used that nonce."""
        with self._engine.begin() as connection:
            return connection.execute(select(TXS.c.id).where(self._is_mine(), TXS.c.nonce == nonce)).first() is not None

    def reverted_count(self, intent_key: str) -> int:
        """How often an intent was mined and refused."""
        with self._engine.begin() as connection:
            counted = select(func.count()).select_from(TXS).where(TXS.c.intent_key == intent_key, TXS.c.state == REVERTED)
            return int(connection.execute(counted).scalar_one())

    def add(self, intent_key: str, nonce: int, request: Request, raw: bytes, fees: Fees) -> None:
        """Store a signed transaction. Once this returns, a crash cannot make the node sign another for that nonce."""
        now_ms = self._now_ms()
        row = {"chain": self._chain, "account": self._account, "nonce": nonce, "intent_key": intent_key}
        row |= {"state": IN_PROGRESS, "request": request.to_json(), "created_ms": now_ms}
        with self._engine.begin() as connection:
            tx_id = connection.execute(insert(TXS).values(**row).returning(TXS.c.id)).scalar_one()
            connection.execute(insert(ATTEMPTS).values(**_attempt_row(tx_id, raw, fees, now_ms)))

    def add_attempt(self, tx: OpenTx, raw: bytes, fees: Fees) -> None:
        """Store a replacement with higher fees, before it is sent."""
        with self._engine.begin() as connection:
            connection.execute(insert(ATTEMPTS).values(**_attempt_row(tx.id, raw, fees, self._now_ms())))

    def mark_sent(self, tx: OpenTx, attempt: Attempt, outcome: SendOutcome) -> None:
        """Note what an endpoint said to an attempt."""
        values: dict[str, Any] = {"sent_ms": self._now_ms(), "outcome": outcome.value}
        if outcome in _MAYBE_SENT:
            values["was_maybe_sent"] = True
        with self._engine.begin() as connection:
            connection.execute(update(ATTEMPTS).where(ATTEMPTS.c.id == attempt.id).values(**values))
            if outcome in (SendOutcome.ACCEPTED, SendOutcome.ALREADY_KNOWN):
                _set_state(connection, tx, UNCONFIRMED)

    def mark_mined(self, tx: OpenTx, attempt: Attempt, receipt: TransactionReceipt) -> None:
        """Attach a receipt by its block's hash; the transaction is on chain, though not yet deep."""
        with self._engine.begin() as connection:
            self._attach(connection, attempt, receipt)
            if tx.state == IN_PROGRESS or tx.foreign_since_ms is not None:
                _set_state(connection, tx, UNCONFIRMED)

    def mark_confirmed(self, tx: OpenTx, is_final: bool) -> None:
        """Mined with success, deep enough: the intent is done."""
        with self._engine.begin() as connection:
            _set_state(connection, tx, FINALIZED if is_final else CONFIRMED)
            finish_intent(connection, tx.intent_key, DONE)

    def mark_reverted(self, tx: OpenTx) -> None:
        """Mined and refused, deep enough: the nonce is spent, and the intent is judged again."""
        with self._engine.begin() as connection:
            _set_state(connection, tx, REVERTED)

    def mark_vanished(self, tx: OpenTx) -> None:
        """A reorganisation took the block away: neither the transaction nor its intent is done any more."""
        with self._engine.begin() as connection:
            _set_state(connection, tx, UNCONFIRMED)
            finish_intent(connection, tx.intent_key, PENDING)

    def mark_foreign(self, tx: OpenTx) -> None:
        """Its nonce was seen spent while none of its versions has a receipt."""
        with self._engine.begin() as connection:
            connection.execute(update(TXS).where(TXS.c.id == tx.id).values(foreign_since_ms=self._now_ms()))

    def mark_lost(self, tx: OpenTx) -> None:
        """Another transaction spent the nonce: the intent waits for a new one."""
        with self._engine.begin() as connection:
            _set_state(connection, tx, LOST)
            finish_intent(connection, tx.intent_key, PENDING)

    def abandon(self, tx: OpenTx, reason: str) -> None:
        """No endpoint can mine it and none has it: free the nonce and fail the intent."""
        with self._engine.begin() as connection:
            connection.execute(update(TXS).where(TXS.c.id == tx.id).values(state=ABANDONED, nonce=None))
            finish_intent(connection, tx.intent_key, FAILED, reason)

    def finish(self, key: str, state: str, reason: str | None = None) -> None:
        """Write an intent's end state."""
        with self._engine.begin() as connection:
            finish_intent(connection, key, state, reason)

    def has_receipt(self, tx: OpenTx) -> bool:
        """Whether any version was ever seen in a block."""
        with self._engine.begin() as connection:
            found = select(RECEIPTS.c.id).where(RECEIPTS.c.attempt_id.in_([attempt.id for attempt in tx.attempts]))
            return connection.execute(found).first() is not None

    def _is_mine(self) -> Any:
        return (TXS.c.chain == self._chain) & (TXS.c.account == self._account)

    def _attempts(self, connection: Connection, tx_id: int) -> tuple[Attempt, ...]:
        rows = connection.execute(select(ATTEMPTS).where(ATTEMPTS.c.tx_id == tx_id).order_by(ATTEMPTS.c.id.desc())).all()
        return tuple(_attempt(row) for row in rows)

    def _attach(self, connection: Connection, attempt: Attempt, receipt: TransactionReceipt) -> None:
        block_hash = "0x" + receipt.block_hash.hex()
        known = select(RECEIPTS.c.id).where(RECEIPTS.c.attempt_id == attempt.id, RECEIPTS.c.block_hash == block_hash)
        if connection.execute(known).first() is not None:
            return
        row: dict[str, Any] = {"attempt_id": attempt.id, "block_number": receipt.block_number, "block_hash": block_hash}
        row |= {"has_succeeded": receipt.has_succeeded, "gas_used": receipt.gas_used, "seen_ms": self._now_ms()}
        connection.execute(insert(RECEIPTS).values(**row, gas_price_wei=str(receipt.gas_price_wei)))


def _states_of(connection: Connection, keys: list[str]) -> list[str | None]:
    rows = connection.execute(select(INTENTS.c.key, INTENTS.c.state).where(INTENTS.c.key.in_(keys))).all()
    found = {row.key: row.state for row in rows}
    return [found.get(key) for key in keys]


def _set_state(connection: Connection, tx: OpenTx, state: str) -> None:
    connection.execute(update(TXS).where(TXS.c.id == tx.id).values(state=state, foreign_since_ms=None))


def _attempt_row(tx_id: int, raw: bytes, fees: Fees, now_ms: int) -> dict[str, Any]:
    return {
        "tx_id": tx_id,
        "raw": raw,
        "hash": "0x" + keccak(raw).hex(),
        "max_fee_wei": str(fees.max_fee_wei),
        "priority_fee_wei": str(fees.priority_fee_wei),
        "created_ms": now_ms,
        "was_maybe_sent": False,
    }


def _attempt(row: Any) -> Attempt:
    fees = Fees(int(row.max_fee_wei), int(row.priority_fee_wei))
    return Attempt(row.id, bytes(row.raw), bytes.fromhex(row.hash[2:]), fees, row.created_ms, row.sent_ms, row.was_maybe_sent)


def _open_tx(row: Any, attempts: tuple[Attempt, ...]) -> OpenTx:
    return OpenTx(row.id, row.intent_key, row.nonce, row.state, Request.from_json(row.request), row.foreign_since_ms, attempts)
