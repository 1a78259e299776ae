"""What an operator can ask of a node, as JSON in and JSON out: the admin socket and the command line call the same functions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attribution.errors import AttributionError
from attribution.signing import checksum_address
from node.adapters.catalog import AdapterCatalog
from node.adapters.entry import CatalogEntry
from node.adapters.locations import is_location, parse_location
from node.adapters.names import parse_name
from node.errors import AdapterNotFoundError, ChainError, RequestError
from node.settlement.claims import active_epoch, claimable, submit_claims
from node.settlement.epochs import EpochSummary
from node.settlement.treasury import Treasury
from node.tenancy.private_adapters import PrivateAdapter
from node.tenancy.store import TenantStore

Operation = Callable[..., Awaitable[Any]]
_CHAIN_TIMEOUT_S = 120.0


def adapter_operations(
    catalog: AdapterCatalog, store: TenantStore, states: Callable[[], Callable[[str], str]]
) -> dict[str, Operation]:
    """adapters.list, adapters.fetching, adapters.add, adapters.remove, adapters.show, adapters.restrict, adapters.release.

    Args:
        states: Where adapters are now, by content hash.
    """

    async def list_all() -> list[dict[str, Any]]:
        state_of = states()
        return [
            {**_adapter(entry), "state": state_of(entry.adapter_id), "owner": _owner(store, entry.name)}
            for entry in catalog.entries()
        ]

    async def fetching() -> list[dict[str, Any]]:
        return [asdict(progress) for progress in await catalog.fetching()]

    async def add(directory: str, name: str | None, owner: str | None = None, allowed: Sequence[str] = ()) -> dict[str, Any]:
        if owner is not None:  # before anybody can see it
            await restrict(name if name is not None else Path(directory).name, owner, allowed, ahead=True)
        return _adapter(await catalog.add(Path(directory), name))

    async def remove(name: str) -> None:
        await catalog.remove(name)

    async def restrict(name: str, owner: str, allowed: Sequence[str], ahead: bool = False) -> dict[str, Any]:
        adapter = PrivateAdapter(_spelled(name), owner, frozenset(allowed))
        if not ahead and not catalog.is_known(adapter.name):
            raise AdapterNotFoundError(
                f"no adapter {adapter.name} is known here, so nothing would be closed; check the spelling, or close the name "
                "before its adapter comes: --ahead",
                param="name",
            )
        await store.restrict_adapter(adapter)
        return {"name": adapter.name, "owner": owner, "allowed": sorted(adapter.allowed)}

    async def release(name: str) -> None:
        spelled = _spelled(name)
        if store.private_adapter(spelled) is None:
            raise AdapterNotFoundError(
                f"{spelled} is not restricted; openlora-node adapters list shows whose each one is", param="name"
            )
        await store.release_adapter(spelled)

    async def show(name: str) -> dict[str, Any]:
        entry = await catalog.resolve(name)
        manifest = None if entry.manifest is None else entry.manifest.to_json()
        coverage = [asdict(item) for item in entry.coverage]
        return {**_adapter(entry), "manifest_hash": entry.manifest_hash, "coverage": coverage, "manifest": manifest}

    return {
        "adapters.list": list_all,
        "adapters.fetching": fetching,
        "adapters.add": add,
        "adapters.remove": remove,
        "adapters.show": show,
        "adapters.restrict": restrict,
        "adapters.release": release,
    }


def settlement_operations(treasury: Treasury) -> dict[str, Operation]:
    """receipts.show, epochs.list, epochs.close, rewards.show, rewards.claim."""
    desk = _RewardDesk(treasury)
    return {
        "receipts.show": desk.receipt,
        "epochs.list": desk.epochs,
        "epochs.close": desk.close_epoch,
        "rewards.show": desk.rewards,
        "rewards.claim": desk.claim,
    }


class _RewardDesk:
    """The settlement operations of one treasury."""

    def __init__(self, treasury: Treasury) -> None:
        self._treasury = treasury

    async def receipt(self, request_id: str) -> dict[str, Any]:
        """The receipt bundle of a request."""
        bundle = await self._treasury.ledger.receipt(request_id)
        if bundle is None:
            raise RequestError(f"no receipt of request {request_id} in this ledger; check the id", code="receipt_not_found")
        return bundle

    async def epochs(self) -> list[dict[str, Any]]:
        """All epochs, newest first."""
        return [_epoch(summary) for summary in await self._treasury.settled().closer.epochs()]

    async def close_epoch(self) -> dict[str, Any] | None:
        """Close an epoch and wait until its root is on the chain."""
        summary = await self._treasury.settled().closer.close()
        if summary is None:
            return None
        states = await self._treasury.wait_for_intents([summary.intent_key], _CHAIN_TIMEOUT_S)
        return {**_epoch(summary), "state": states[summary.intent_key]}

    async def rewards(self, account: str | None) -> list[dict[str, Any]]:
        """What each account earned by paid requests, what an epoch that pays now covers, and what it received."""
        settlement, earned = self._treasury.settled(), await self._earned(account)
        paying = await settlement.closer.paying_epoch() if earned else None
        claimed = await asyncio.to_thread(self._claimed, list(earned))
        covered = {} if paying is None else dict(paying.tree.entries)
        return [
            {
                "account": name,
                "earned_wei": str(earned_wei),
                "in_epoch_wei": str(covered.get(name, 0)),
                "claimed_wei": str(claimed[name]),
            }
            for name, earned_wei in earned.items()
        ]

    async def claim(self, account: str | None) -> list[dict[str, Any]]:
        """Pay `account`, or everybody, what the newest epoch that pays grants and the chain has not paid."""
        treasury, settlement = self._treasury, self._treasury.settled()
        earned = await self._earned(account)
        if not earned:
            return []
        paying = await settlement.closer.paying_epoch()
        if paying is None:
            await self._explain_no_epoch()
            return []
        contracts = settlement.rails.contracts
        entries = [entry for name in sorted(earned) if (entry := paying.claim(name)) is not None]
        due = await asyncio.to_thread(claimable, contracts, paying.operator, entries)
        payable = [entry for entry, _ in due]
        keys = await treasury.ledger.transact(
            lambda connection: submit_claims(connection, contracts, paying.operator, paying.epoch_id, payable, _now_ms())
        )
        states = await treasury.wait_for_intents(list(dict.fromkeys(keys)), _CHAIN_TIMEOUT_S)
        return [
            {"account": entry.account, "paid_wei": str(amount_wei), "state": states[key]}
            for (entry, amount_wei), key in zip(due, keys, strict=True)
        ]

    async def _earned(self, account: str | None) -> dict[str, int]:
        """Wei by account, of usage that payers signed for, largest first."""
        if account is not None:
            try:
                account = checksum_address(account, "account")
            except AttributionError as error:
                raise RequestError(f"{error}", param="account") from error
        earned: dict[str, int] = {}
        for row in await self._treasury.ledger.earnings(account=account):
            if row.payable_wei:
                earned[row.account] = earned.get(row.account, 0) + row.payable_wei
        return dict(sorted(earned.items(), key=lambda item: (-item[1], item[0])))

    async def _explain_no_epoch(self) -> None:
        """Say why nothing can be claimed although something was earned."""
        settlement, operator = self._treasury.settled(), self._treasury.keys.operator.address
        epochs = [summary for summary in await settlement.closer.epochs() if summary.state == "done"]
        if not epochs:
            raise ChainError("no epoch covers these earnings yet; close one: openlora-node epochs close", code="epoch_unknown")
        await asyncio.to_thread(active_epoch, settlement.rails.contracts, operator, epochs[0].epoch_id, int(time.time()))

    def _claimed(self, accounts: list[str]) -> dict[str, int]:
        """What the chain has paid to each account; blocks."""
        contracts, operator = self._treasury.settled().rails.contracts, self._treasury.keys.operator.address
        return {account: contracts.claimed_wei(operator, account) for account in accounts}


def _owner(store: TenantStore, name: str) -> str | None:
    """The tenant that a private name belongs to; None for a public one."""
    private = store.private_adapter(name)
    return None if private is None else private.owner


def _spelled(name: str) -> str:
    """What a restriction is about: a location, or a name of the grammar in all its revisions."""
    return str(parse_location(name)) if is_location(name) else parse_name(name).path


def _adapter(entry: CatalogEntry) -> dict[str, Any]:
    trainer = entry.manifest.trainer if entry.manifest is not None else None
    return {
        "name": entry.name,
        "source": entry.source,
        "adapter_id": entry.adapter_id,
        "rank": entry.rank,
        "size": entry.size_bytes,
        "trainer": "unknown" if trainer is None else trainer.address,
        "directory": str(entry.directory),
    }


def _epoch(summary: EpochSummary) -> dict[str, Any]:
    return {
        "epoch_id": summary.epoch_id,
        "state": summary.state,
        "records": summary.record_count,
        "total_wei": str(summary.total_wei),
        "root": "0x" + summary.root,
        "receipts_root": "0x" + summary.receipts_root,
        "closed_ms": summary.closed_ms,
    }


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
