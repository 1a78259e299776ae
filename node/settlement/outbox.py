"""Intents become transactions, each at most once, whatever crashes on the way.

The order is the whole idea: choose the nonce, sign, **store the signed bytes and commit, then send**. A restart sends the stored
bytes again; the same bytes have the same hash and can be mined only once. Nothing is ever signed twice for one nonce except a
replacement of the same call with higher fees.

| crash | left behind | what the next run does |
|---|---|---|
| before the commit | nothing | plans the intent again, same nonce |
| after the commit, before the send | in_progress | sends the stored bytes |
| after the send, before noting it | in_progress, known to the chain | finds the receipt, or "already known" |
| after mining, before noting it | unconfirmed | finds the receipt by hash |
| database restored from a backup | nonce behind the chain | the chain's nonce wins, and done intents are seen as done |
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from node.errors import ChainError
from node.settlement.chain import Chain
from node.settlement.fees import Fees, bumped_fees, gas_limit, initial_fees
from node.settlement.intents import DONE, FAILED
from node.settlement.outbox_calls import IntentCalls, IntentMalformed, Progress
from node.settlement.outbox_store import Attempt, Intent, OpenTx, OutboxStore, Request
from node.settlement.outbox_tables import CONFIRMED, IN_PROGRESS
from node.settlement.rpc_errors import Revert, SendOutcome
from node.settlement.rpc_values import BlockInfo, TransactionReceipt
from node.settlement.settlement_contracts import SettlementContracts
from node.settlement.signer import Signer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OutboxLimits:
    """How patient the outbox is.

    Args:
        confirmations: Blocks, its own included, after which a transaction counts as done; at least 1 is used.
        final_depth: Blocks after which it is final on chains whose `finalized` tag says nothing.
        resend_ms: After which the same bytes are sent again.
        bump_ms: After which a waiting transaction gets higher fees.
        foreign_ms: How long a spent nonce without a receipt may be a slow endpoint before it counts as lost.
        retry_ms: After which a refusal that time may cure is tried again.
        max_fee_wei: Most a unit of gas may cost; above it everything waits, since no intent is urgent enough to overpay.
        max_in_flight: Transactions sent and not yet mined.
        max_reverts: Mined refusals after which an intent fails.
    """

    confirmations: int = 1
    final_depth: int = 64
    resend_ms: int = 15_000
    bump_ms: int = 45_000
    foreign_ms: int = 60_000
    retry_ms: int = 2_000
    max_fee_wei: int = 500_000_000_000
    max_in_flight: int = 8
    max_reverts: int = 2


class Outbox:
    """The only sender of its account. `run_once` belongs to one thread at a time.

    Args:
        engine: The ledger's database, locked for this node.
        contracts: Deployed and verified, on a connected chain.
        signer: The submitter.
        now_ms: UTC clock.
        limits: See `OutboxLimits`.
    """

    def __init__(
        self, engine: Engine, contracts: SettlementContracts, signer: Signer, now_ms: Callable[[], int], limits: OutboxLimits
    ) -> None:
        self._chain: Chain = contracts.chain
        self._calls = IntentCalls(contracts)
        self._signer, self._now_ms, self._limits = signer, now_ms, limits
        self._store = OutboxStore(engine, "0x" + self._chain.genesis_hash().hex(), signer.address, now_ms)
        self._running = threading.Lock()
        self._retry_at_ms: dict[str, int] = {}  # by intent key; forgotten at restart, which only costs a retry

    def run_once(self) -> bool:
        """Look at everything that is not final, then start what can be started.

        Returns:
            Whether anything changed; call again soon if so.

        Raises:
            ChainError: The chain does not answer, or is not the chain it was.
        """
        with self._running:
            self._chain.connect()
            head = self._chain.head()
            has_moved = sum(self._follow(tx, head) for tx in self._store.open_txs()) > 0  # not any(): all must be looked at
            for _ in range(self._limits.max_in_flight):
                if not self._start_next():
                    break
                has_moved = True
            return has_moved

    async def run(self, stop: asyncio.Event, wake: asyncio.Event, poll_s: float = 1.0) -> None:
        """Call `run_once` on a worker thread until `stop` is set.

        Args:
            stop: Ends the task after the run in progress.
            wake: Set by whoever wrote an intent, to be looked at before `poll_s` is over.
            poll_s: Between runs; ten times as long while the chain does not answer.
        """
        while not stop.is_set():
            pause_s = poll_s
            try:
                if await asyncio.to_thread(self.run_once):
                    pause_s = min(poll_s, 0.05)
            except ChainError as error:
                logger.warning("settlement waits: %s", error.message)
                pause_s = 10 * poll_s
            except OperationalError:
                logger.warning("settlement waits: the ledger's database is busy")
            wake.clear()
            waiters = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(wake.wait())]
            try:
                await asyncio.wait(waiters, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for waiter in waiters:
                    waiter.cancel()

    def _follow(self, tx: OpenTx, head: BlockInfo) -> bool:
        """Bring one transaction up to date with the chain."""
        found = self._mined_attempt(tx)
        if found is not None:
            return self._follow_mined(tx, *found, head)
        if self._store.has_receipt(tx) and tx.state == CONFIRMED:
            logger.warning("a reorganisation removed transaction 0x%s; sending it again", tx.newest.hash.hex())
            self._store.mark_vanished(tx)
            self._broadcast(tx, tx.newest)
            return True
        if self._chain.nonce(self._signer.address) > tx.nonce:
            return self._follow_foreign(tx)
        return self._push(tx)

    def _mined_attempt(self, tx: OpenTx) -> tuple[Attempt, TransactionReceipt] | None:
        """The version that is in the canonical chain now, checked by its block's hash."""
        for attempt in tx.attempts:
            receipt = self._chain.receipt(attempt.hash)
            if receipt is None:
                continue
            block = self._chain.block(receipt.block_number)
            if block is not None and block.block_hash == receipt.block_hash:
                return attempt, receipt
        return None

    def _follow_mined(self, tx: OpenTx, attempt: Attempt, receipt: TransactionReceipt, head: BlockInfo) -> bool:
        self._store.mark_mined(tx, attempt, receipt)
        depth = head.number - receipt.block_number + 1
        if depth < max(1, self._limits.confirmations):
            if tx.state == CONFIRMED:  # a reorganisation moved it into a younger block
                self._store.mark_vanished(tx)
            return tx.state == CONFIRMED
        if not receipt.has_succeeded:
            self._store.mark_reverted(tx)
            self._judge_reverted(tx)
            return True
        is_final = self._is_final(receipt.block_number, depth)
        if is_final or tx.state != CONFIRMED:
            self._store.mark_confirmed(tx, is_final)
            return True
        return False

    def _is_final(self, block_number: int, depth: int) -> bool:
        finalized = self._chain.block("finalized")
        return depth >= self._limits.final_depth or (finalized is not None and finalized.number >= block_number)

    def _judge_reverted(self, tx: OpenTx) -> None:
        """A mined refusal: perhaps somebody else did it first, perhaps it must be tried again, perhaps never."""
        intent = self._store.intent(tx.intent_key)
        if intent is None:
            return
        if self._finish_if_decided(intent):
            return
        if self._store.reverted_count(intent.key) >= self._limits.max_reverts:
            self._fail(intent, "reverted")

    def _follow_foreign(self, tx: OpenTx) -> bool:
        """The nonce is spent, but by none of our versions as far as this endpoint knows."""
        if tx.foreign_since_ms is None:
            self._store.mark_foreign(tx)
            return True
        if self._now_ms() - tx.foreign_since_ms < self._limits.foreign_ms:
            return False
        logger.error(
            "nonce %d of %s was used by another sender; %s is planned again", tx.nonce, self._signer.address, tx.intent_key
        )
        self._store.mark_lost(tx)
        return True

    def _push(self, tx: OpenTx) -> bool:
        """Not mined: send, send again, or offer more."""
        attempt, now_ms = tx.newest, self._now_ms()
        if attempt.sent_ms is None:
            return self._broadcast(tx, attempt)
        if now_ms - attempt.created_ms >= self._limits.bump_ms and attempt.was_maybe_sent:
            return self._bump(tx)
        if now_ms - attempt.sent_ms >= self._limits.resend_ms or (tx.state == IN_PROGRESS and attempt.was_maybe_sent):
            return self._broadcast(tx, attempt)
        return False

    def _broadcast(self, tx: OpenTx, attempt: Attempt, may_bump: bool = True) -> bool:
        """Send stored bytes and act on the answer."""
        outcome = self._chain.send_raw(attempt.raw)
        self._store.mark_sent(tx, attempt, outcome)
        if outcome in (SendOutcome.UNDERPRICED, SendOutcome.FEE_BELOW_BASE) and may_bump:
            return self._bump(tx)
        if outcome is SendOutcome.INSUFFICIENT_FUNDS:
            logger.error("%s cannot pay for gas; send it some of the chain's native coin", self._signer.address)
        if outcome is SendOutcome.REJECTED and not any(item.was_maybe_sent for item in tx.attempts):
            logger.error("the chain can never mine %s; it is given up", tx.intent_key)
            self._store.abandon(tx, "rejected")
        return outcome in (SendOutcome.ACCEPTED, SendOutcome.REJECTED)

    def _bump(self, tx: OpenTx) -> bool:
        """Replace with higher fees: the same call and nonce, so whichever version is mined does the same thing once."""
        fees = bumped_fees(tx.newest.fees, self._chain.fee_market())
        if fees.max_fee_wei > self._limits.max_fee_wei:
            logger.warning("gas costs more than %d wei; %s waits with its last fees", self._limits.max_fee_wei, tx.intent_key)
            self._store.mark_sent(tx, tx.newest, self._chain.send_raw(tx.newest.raw))
            return False
        self._store.add_attempt(tx, self._sign(tx.nonce, tx.request, fees), fees)
        [renewed] = [item for item in self._store.open_txs() if item.id == tx.id]
        self._broadcast(renewed, renewed.newest, may_bump=False)
        return True

    def _start_next(self) -> bool:
        """Turn the oldest ready intent into a stored transaction and send it."""
        waiting = [tx for tx in self._store.open_txs() if tx.state != CONFIRMED]
        if len(waiting) >= self._limits.max_in_flight or any(tx.state == IN_PROGRESS for tx in waiting):
            return False
        now_ms = self._now_ms()
        for intent in self._store.ready_intents(limit=self._limits.max_in_flight * 4):
            if self._retry_at_ms.get(intent.key, 0) > now_ms:
                continue
            if self._start(intent):
                return True
        return False

    def _start(self, intent: Intent) -> bool:
        """Plan one intent; True when it moved: was sent, or reached its end."""
        try:
            call = self._calls.call(intent)
            if self._finish_if_decided(intent):
                return True
        except (IntentMalformed, KeyError, TypeError, ValueError):
            self._fail(intent, "malformed")
            return True
        estimate = self._preflight(Request(call, 0))
        if isinstance(estimate, Revert):
            return self._refused(intent, estimate)
        fees = initial_fees(self._chain.fee_market())
        nonce = self._free_nonce()
        if nonce is None or fees.max_fee_wei > self._limits.max_fee_wei:
            self._postpone(intent)
            return False
        request = Request(call, gas_limit(estimate))
        self._store.add(intent.key, nonce, request, self._sign(nonce, request, fees), fees)
        self._retry_at_ms.pop(intent.key, None)
        [tx] = [item for item in self._store.open_txs() if item.nonce == nonce]
        self._broadcast(tx, tx.newest)
        return True

    def _preflight(self, request: Request) -> int | Revert:
        """Run the call against the newest state first: a revert then costs nothing and has a name."""
        outcome = self._chain.try_call(self._signer.address, request.call)
        if isinstance(outcome, Revert):
            return outcome
        return self._chain.estimate_gas(self._signer.address, request.call)

    def _refused(self, intent: Intent, revert: Revert) -> bool:
        named = self._calls.named(revert)
        if self._calls.is_curable(named):
            logger.info("settlement of %s waits: %s", intent.key, named.name)
            self._postpone(intent)
            return False
        self._fail(intent, f"reverted:{named.name or '0x' + revert.data[:4].hex()}")
        return True

    def _finish_if_decided(self, intent: Intent) -> bool:
        progress = self._calls.progress(intent)
        if progress is Progress.DONE:
            self._store.finish(intent.key, DONE)
        elif progress is Progress.IMPOSSIBLE:
            self._fail(intent, "conflict")
        return progress is not Progress.TO_DO

    def _fail(self, intent: Intent, reason: str) -> None:
        logger.error("settlement of %s failed: %s", intent.key, reason)
        self._retry_at_ms.pop(intent.key, None)
        self._store.finish(intent.key, FAILED, reason)

    def _postpone(self, intent: Intent) -> None:
        self._retry_at_ms[intent.key] = self._now_ms() + self._limits.retry_ms

    def _free_nonce(self) -> int | None:
        """The lowest nonce that neither the chain nor an open transaction of ours has; None when the endpoint is behind us."""
        nonce = self._chain.nonce(self._signer.address)
        taken = {tx.nonce for tx in self._store.open_txs()}
        while nonce in taken:
            nonce += 1
        if self._store.is_spent(nonce):
            logger.warning(
                "the endpoint does not know nonce %d of %s, which was mined; waiting for it", nonce, self._signer.address
            )
            return None
        return nonce

    def _sign(self, nonce: int, request: Request, fees: Fees) -> bytes:
        return self._signer.sign_transaction(
            {
                "chainId": self._chain.chain_id,
                "nonce": nonce,
                "to": request.call.to,
                "value": request.call.value_wei,
                "data": request.call.data,
                "gas": request.gas,
                "maxFeePerGas": fees.max_fee_wei,
                "maxPriorityFeePerGas": fees.priority_fee_wei,
                "type": 2,
            }
        )
