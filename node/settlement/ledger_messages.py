"""What the API process and the ledger process say to each other: JSON messages over two pipes, each after its length.

JSON and not msgpack, because amounts of 256 bits are integers here. Down: one `LedgerConfig`, then `Work`. Up: one `Opened` or
`Refused`, then a `Settled` for each group that was committed. The end of the input is the order to stop.
"""

from __future__ import annotations

from typing import Any

import msgspec

from node.child_messages import framed
from node.settlement.admission import Admission, Outcome
from node.settlement.ledger_state import PayerState
from node.settlement.ledger_store import WriterOptions
from node.settlement.ledger_writer import SignedReceipt

MAX_MESSAGE_BYTES = 1 << 30


class LedgerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is told first. The key stays in its file: the process opens it itself.

    `lost` is None at the node's start; after the loss of a ledger process it names the requests whose answers ended without a
    receipt meanwhile.
    """

    url: str
    keys_dir: str
    chain_id: int
    options: WriterOptions
    lost: list[str] | None = None


class AdmitCall(msgspec.Struct, frozen=True, array_like=True, tag="admit"):
    """Make an admission durable."""

    call_id: int
    admission: Admission
    admitted_ms: int


class CloseCall(msgspec.Struct, frozen=True, array_like=True, tag="close"):
    """Make a request's record durable."""

    call_id: int
    outcome: Outcome


Call = AdmitCall | CloseCall


class Work(msgspec.Struct, frozen=True):
    """Calls, in order."""

    calls: list[Call]


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """The ledger is open."""

    operator: str
    tenant_salt: bytes
    interrupted: int
    payers: dict[str, PayerState]


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Instead of `Opened`. `error` as `NodeError.to_json` has it."""

    error: dict[str, Any]


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What became of a call: an admission has neither `receipt` nor `error`."""

    call_id: int
    receipt: SignedReceipt | None = None
    error: dict[str, Any] | None = None


class Settled(msgspec.Struct, frozen=True, tag="settled"):
    """A group has ended, well or not. `payers` are those that it changed."""

    answers: list[Answer]
    payers: dict[str, PayerState]
    is_healthy: bool


Event = Opened | Refused | Settled


def packed(message: msgspec.Struct) -> bytes:
    """A message as it goes through a pipe."""
    return framed(msgspec.json.encode(message))
