"""The hand-over between money and chain: an intent is written in the same transaction as the rows it follows from.

Whoever closes an epoch writes intents; the outbox turns each into at most one mined transaction and writes its end state back.
An intent's key says what must happen once, so writing it twice changes nothing.

Kinds and their payloads (JSON; amounts are decimal strings, bytes are 0x and hex digits):
    collect        payer, operator, cumulative, deadline, payer_signature, cumulative_used, operator_signature
                   -> UsageEscrow.collect(Voucher(payer, operator, cumulative, deadline), payer_signature,
                      cumulative_used, operator_signature)
    submit_epoch   operator, epoch_id, root, receipts_root, leaves_hash, total_cumulative, operator_signature
                   -> AttributionRewards.submitEpoch(Epoch(...), operator_signature)
    claim          operator, epoch_id, account, cumulative, proof
                   -> AttributionRewards.claim(...)
    claim_many     operator, epoch_id, claims: a list of {account, cumulative, proof}
                   -> AttributionRewards.claimMany(...)
    register_adapter   adapter_id, manifest_hash, base_id, trainer, uri, trainer_signature
                   -> AdapterRegistry.register(...)
    deposit        payer, amount
                   -> UsageEscrow.deposit(payer, amount)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sqlalchemy import BigInteger, Connection, Integer, Text, insert, select, update
from sqlmodel import Field, SQLModel

PENDING = "pending"  # not yet final on chain
DONE = "done"  # mined with success, as deep as the settings ask
FAILED = "failed"  # can never be mined with success; `reason` says why


class ChainIntent(SQLModel, table=True):
    """Something that must happen on chain exactly once."""

    __tablename__ = "chain_intent"

    # SQLite only counts up by itself in an INTEGER column, PostgreSQL should not run out of numbers.
    id: int | None = Field(default=None, primary_key=True, sa_type=BigInteger().with_variant(Integer, "sqlite"))
    key: str = Field(unique=True, max_length=200)
    kind: str = Field(max_length=32)
    payload: str = Field(sa_type=Text)
    after: str = Field(default="[]", sa_type=Text)  # JSON list of keys that must be done before this one may be sent
    state: str = Field(default=PENDING, max_length=16, index=True)
    reason: str | None = Field(default=None, sa_type=Text)
    created_ms: int = Field(sa_type=BigInteger)


INTENTS = SQLModel.metadata.tables["chain_intent"]


class IntentWriter(Protocol):
    """What the epoch closer needs of the outbox: `submit_intent` below, or a fake."""

    def __call__(
        self,
        connection: Connection,
        kind: str,
        key: str,
        payload: Mapping[str, Any],
        *,
        after: Sequence[str] = (),
        created_ms: int,
    ) -> None: ...


def submit_intent(
    connection: Connection, kind: str, key: str, payload: Mapping[str, Any], *, after: Sequence[str] = (), created_ms: int
) -> None:
    """Write an intent inside the caller's transaction; a key that is already there is left as it is.

    Args:
        connection: In a transaction that also holds the rows the intent follows from.
        kind: One of the kinds above.
        key: What must happen once, such as "collect:<chain>:<escrow>:<payer>:<cumulative_used>".
        payload: JSON as described above.
        after: Keys of intents that must be done first; when one of them fails, this one fails too.
        created_ms: UTC milliseconds.
    """
    if connection.execute(select(INTENTS.c.id).where(INTENTS.c.key == key)).first() is not None:
        return
    values = {
        "key": key,
        "kind": kind,
        "payload": json.dumps(dict(payload), sort_keys=True),
        "after": json.dumps(list(after)),
        "state": PENDING,
        "created_ms": created_ms,
    }
    connection.execute(insert(INTENTS).values(**values))


def intent_state(connection: Connection, key: str) -> str | None:
    """PENDING, DONE or FAILED, or None when nothing was ever submitted under `key`."""
    row = connection.execute(select(INTENTS.c.state).where(INTENTS.c.key == key)).first()
    return None if row is None else str(row[0])


def finish_intent(connection: Connection, key: str, state: str, reason: str | None = None) -> None:
    """Write an intent's end state (DONE or FAILED, with the reason) inside the caller's transaction."""
    connection.execute(update(INTENTS).where(INTENTS.c.key == key).values(state=state, reason=reason))
