"""The ledger process: `python -m node.settlement.ledger_process`, started by `node.settlement.ledger_client`.

Records are built, signed and committed here, so that a wave of answers that end together holds neither the API process's event
loop nor its interpreter lock. Messages come on standard input, whose end is the order to stop; nobody but the parent has it.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from node.child_messages import Outlet, read_message
from node.errors import LedgerError, NodeError
from node.settlement.admission import open_request
from node.settlement.keys import KeyDirectory
from node.settlement.ledger_messages import (
    MAX_MESSAGE_BYTES,
    Answer,
    Call,
    CloseCall,
    Event,
    LedgerConfig,
    Opened,
    Refused,
    Settled,
    Work,
    packed,
)
from node.settlement.ledger_state import PayerState
from node.settlement.ledger_store import LedgerStore
from node.settlement.ledger_writer import Admit, Close, Done, SignedReceipt

EXIT_REFUSED = 3
LOCK_PATIENCE_S = 2.0  # with the ledger process of a node that was killed: it commits what it was told, and ends


class LedgerDesk:
    """Hands calls to the writer, and sends up what became of each group of them."""

    def __init__(self, config: LedgerConfig, outlet: Outlet[Event]) -> None:
        self._outlet = outlet
        self._answers: list[Answer] = []  # of the group under way; like the next two, of the writer's thread
        self._touched: set[str] = set()  # payers of that group
        self._payers: dict[str, PayerState] = {}
        signer = KeyDirectory(Path(config.keys_dir)).load("operator")
        self._operator = signer.address
        self._store = _patiently_opened(config, signer=signer, chain_id=config.chain_id, settled=self._settle)
        self._payers = self._store.writer.payers
        outlet.send(Opened(self._operator, self._store.tenant_salt, self._store.interrupted, self._payers))

    def take(self, calls: Sequence[Call]) -> None:
        """Begin the calls of one message, which share a commit."""
        items: dict[int, Admit | Close] = {}
        refused: list[Answer] = []
        for call in calls:
            try:
                items[call.call_id] = self._item(call)
            except NodeError as error:
                refused.append(Answer(call.call_id, error=error.to_json()))
        try:
            self._store.writer.put(*items.values())
        except NodeError as error:
            refused += [Answer(call_id, error=error.to_json()) for call_id in items]
        if refused:
            self._outlet.send(Settled(refused, {}, self._store.writer.is_healthy))

    def close(self) -> None:
        """Finish what was begun."""
        self._store.close()

    def _item(self, call: Call) -> Admit | Close:
        if isinstance(call, CloseCall):
            return Close(call.outcome, self._done(call.call_id))
        request = open_request(
            call.admission,
            operator=self._operator,
            admitted_ms=call.admitted_ms,
            tenant_salt=self._store.tenant_salt,
            random_bytes=os.urandom,
        )
        return Admit(request, self._done(call.call_id, None if request.voucher is None else request.voucher.payer))

    def _done(self, call_id: int, payer: str | None = None) -> Done:
        def keep(result: Any, error: BaseException | None) -> None:
            receipt = result if isinstance(result, SignedReceipt) else None
            self._answers.append(Answer(call_id, receipt, None if error is None else _described(error)))
            touched = payer if receipt is None else receipt.payer
            if touched is not None:
                self._touched.add(touched)

        return keep

    def _settle(self) -> None:
        """A group has ended. After a failure the writer has read all payers again."""
        writer = self._store.writer
        changed = writer.payers
        if changed is self._payers:
            changed = {payer: changed[payer] for payer in self._touched if payer in changed}
        self._payers = writer.payers
        answers, self._answers, self._touched = self._answers, [], set()
        self._outlet.send(Settled(answers, changed, writer.is_healthy))


def main() -> int:
    """Serve until the input ends; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # four lines of every start say nothing to an operator
    outlet: Outlet[Event] = Outlet.of_stdout(packed)
    content = read_message(sys.stdin.buffer, MAX_MESSAGE_BYTES)
    if content is None:
        return EXIT_REFUSED
    try:
        desk = LedgerDesk(msgspec.json.decode(content, type=LedgerConfig), outlet)
    except NodeError as error:
        outlet.send(Refused(error.to_json()))
        return EXIT_REFUSED
    gc.collect()
    gc.freeze()
    decoder = msgspec.json.Decoder(Work)
    while (content := read_message(sys.stdin.buffer, MAX_MESSAGE_BYTES)) is not None:
        desk.take(decoder.decode(content).calls)
    desk.close()
    return 0


def _patiently_opened(config: LedgerConfig, **more: Any) -> LedgerStore:
    deadline_s = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            return LedgerStore.open(config.url, config.options, clock_ms=_now_ms, lost=config.lost, **more)
        except LedgerError as error:
            if error.error_code != "ledger_locked" or time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)


def _described(error: BaseException) -> dict[str, Any]:
    known = error if isinstance(error, NodeError) else LedgerError("the ledger failed inside the node; its log says why")
    return known.to_json()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


if __name__ == "__main__":
    sys.exit(main())
