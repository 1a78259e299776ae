"""The settlement room, opened in order: keys, chain, contracts, ledger, voucher desk, epoch closer, outbox."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from structlog.typing import FilteringBoundLogger

from attribution.fees import Payees
from attribution.voucher import escrow_domain
from node.config import LEDGER_NAME, PricingSettings, Settings
from node.errors import ChainError, NodeError
from node.settlement.epochs import EpochCloser
from node.settlement.intents import DONE, FAILED, INTENTS, submit_intent
from node.settlement.keys import KeyDirectory, NodeKeys
from node.settlement.ledger import Ledger
from node.settlement.ledger_client import begin
from node.settlement.ledger_epochs import SettlementPlace
from node.settlement.outbox import Outbox, OutboxLimits
from node.settlement.rails import Rails, open_rails
from node.settlement.rpc_session import host_of
from node.settlement.vouchers import VoucherDesk

NO_CHAIN_ID = 0  # receipts of a node that settles nowhere are bound to no chain
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Settlement:
    """What exists only with a chain. `wake` tells the outbox that an intent was written."""

    rails: Rails
    desk: VoucherDesk
    closer: EpochCloser
    wake: asyncio.Event


@dataclass(frozen=True, slots=True)
class Treasury:
    """Everything that turns served requests into payments."""

    keys: NodeKeys
    payees: Payees
    pricing: PricingSettings
    ledger: Ledger
    settlement: Settlement | None

    def settled(self) -> Settlement:
        """The chain's half.

        Raises:
            ChainError: This node has no chain.
        """
        if self.settlement is None:
            raise ChainError('this node settles on no chain (chain.profile is "none"); choose another profile', code="chain_none")
        return self.settlement

    def describe(self) -> str:
        """One line for whoever started the node."""
        if self.settlement is None:
            return "none: usage is recorded, nobody is paid"
        rails = self.settlement.rails
        return f"{rails.profile.name}, chain id {rails.chain.chain_id}, {host_of(rails.rpc_url)}"

    def payment_terms(self) -> dict[str, Any] | None:
        """What a payer must know to sign a voucher; None on a node that takes no payment."""
        if self.settlement is None:
            return None
        rails = self.settlement.rails
        return {
            "operator": self.keys.operator.address,
            "chain_id": rails.chain.chain_id,
            "escrow": rails.contracts.addresses.escrow,
            "rewards": rails.contracts.addresses.rewards,
            "token": rails.contracts.addresses.token,
            "input_token_wei": str(self.pricing.input_token_wei),
            "output_token_wei": str(self.pricing.output_token_wei),
        }

    async def wait_for_intents(self, keys: Sequence[str], timeout_s: float) -> dict[str, str]:
        """Wake the outbox and wait until every intent is done or failed, or the time is over; the states by key."""
        self.settled().wake.set()
        deadline_s = time.monotonic() + timeout_s
        while True:
            rows = await self.ledger.read(lambda reads: reads.rows(INTENTS.select().where(INTENTS.c.key.in_(keys))))
            states = {str(row.key): str(row.state) for row in rows}
            if all(state in (DONE, FAILED) for state in states.values()) or time.monotonic() >= deadline_s:
                return states
            await asyncio.sleep(_POLL_S)


@asynccontextmanager
async def open_treasury(settings: Settings, logger: FilteringBoundLogger) -> AsyncIterator[Treasury]:
    """Open the room; on leaving, everything is closed in the opposite order and nothing signed is lost.

    Raises:
        KeystoreError, ChainError, LedgerError, ConfigError: Whatever cannot be opened.
    """
    async with AsyncExitStack() as stack:
        writer = await begin()  # its imports take as long as opening the keys
        stack.push_async_callback(writer.stop)
        directory = KeyDirectory(settings.data_dir / "keys")
        keys = await asyncio.to_thread(directory.open)
        rails = await stack.enter_async_context(open_rails(settings, directory, keys.submitter.address, logger))
        ledger = Ledger(
            ledger_url(settings),
            clock_ms=_now_ms,
            signer=keys.operator,
            chain_id=NO_CHAIN_ID if rails is None else rails.chain.chain_id,
            group_commit_ms=settings.ledger.group_commit_ms,
            keys_dir=settings.data_dir / "keys",
            process=writer,
        )
        interrupted = await ledger.open()
        stack.push_async_callback(ledger.shutdown)
        if interrupted:
            logger.warning("requests_interrupted", count=interrupted)
        payees = Payees(keys.payout_address, settings.chain.reserve_address or keys.payout_address)
        settlement = None
        if rails is not None:
            settlement = _settlement(keys, rails, ledger)
            await stack.enter_async_context(_running(settings, keys, ledger, settlement, logger))
        yield Treasury(keys, payees, settings.pricing, ledger, settlement)


def _settlement(keys: NodeKeys, rails: Rails, ledger: Ledger) -> Settlement:
    addresses, operator = rails.contracts.addresses, keys.operator.address
    desk = VoucherDesk(
        used_wei=ledger.used_wei,
        best_voucher=ledger.best_voucher,
        operator=operator,
        domain=escrow_domain(rails.chain.chain_id, addresses.escrow),
        escrow=rails.contracts,
        now_s=time.time,
        monotonic_s=time.monotonic,
    )
    closer = EpochCloser(
        ledger,
        signer=keys.operator,
        contracts=rails.contracts,
        place=SettlementPlace(rails.chain.chain_id, addresses.escrow, addresses.rewards, operator),
        submit_intent=submit_intent,
        clock_ms=_now_ms,
    )
    return Settlement(rails, desk, closer, asyncio.Event())


@asynccontextmanager
async def _running(
    settings: Settings, keys: NodeKeys, ledger: Ledger, settlement: Settlement, logger: FilteringBoundLogger
) -> AsyncIterator[None]:
    """The room's background tasks: the outbox always, the epoch timer when epochs close by themselves."""
    limits = OutboxLimits(confirmations=settings.chain.confirmations)
    outbox = await asyncio.to_thread(Outbox, ledger.engine, settlement.rails.contracts, keys.submitter, _now_ms, limits)
    stop = asyncio.Event()
    tasks = [asyncio.create_task(outbox.run(stop, settlement.wake), name="outbox")]
    if settings.chain.epoch_s:
        tasks.append(asyncio.create_task(_close_regularly(settings.chain.epoch_s, settlement, stop, logger), name="epochs"))
    for task in tasks:
        task.add_done_callback(lambda ended: _report(ended, logger))
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*tasks)


def _report(task: asyncio.Task[None], logger: FilteringBoundLogger) -> None:
    """A background task that ends by a defect must be heard when it happens, not when the node is stopped."""
    if not task.cancelled() and task.exception() is not None:
        logger.error("settlement_task_died", task=task.get_name(), exc_info=task.exception())


async def _close_regularly(epoch_s: float, settlement: Settlement, stop: asyncio.Event, logger: FilteringBoundLogger) -> None:
    """Close an epoch every `epoch_s` seconds. One that fails is harmless: totals are cumulative, so the next one covers it."""
    while not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), epoch_s)
        except TimeoutError:
            try:
                summary = await settlement.closer.close()
            except NodeError as error:
                logger.warning("epoch_not_closed", code=error.error_code, reason=error.message)
            else:
                if summary is not None:
                    settlement.wake.set()
                    logger.info("epoch_closed", epoch_id=summary.epoch_id, records=summary.record_count, root=summary.root)


def ledger_url(settings: Settings) -> str:
    """Where the ledger is: as configured, else SQLite in the data directory."""
    return settings.ledger.url or f"sqlite:///{settings.data_dir.absolute() / LEDGER_NAME}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
