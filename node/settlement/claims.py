"""Pay out what an epoch's root grants: anyone may send it, the money goes to the payees alone."""

from __future__ import annotations

import json
from collections.abc import Sequence

from eth_utils.crypto import keccak
from sqlalchemy import Connection

from node.errors import ChainError
from node.settlement.intents import submit_intent
from node.settlement.settlement_contracts import ClaimEntry, EpochStatus, SettlementContracts

MAX_CLAIMS_IN_CALL = 50  # about 35,000 gas each: a twentieth of a block


def claimable(contracts: SettlementContracts, operator: str, entries: Sequence[ClaimEntry]) -> list[tuple[ClaimEntry, int]]:
    """The entries with something left to receive, and how much, in wei.

    Raises:
        ChainError: The chain cannot be asked.
    """
    unpaid = [(entry, entry.cumulative_wei - contracts.claimed_wei(operator, entry.account)) for entry in entries]
    return [(entry, amount_wei) for entry, amount_wei in unpaid if amount_wei > 0]


def active_epoch(contracts: SettlementContracts, operator: str, epoch_id: int, now_s: int) -> EpochStatus:
    """The epoch, if its rewards can be claimed now.

    Raises:
        ChainError: epoch_unknown, epoch_void, or epoch_not_active with the seconds left as `retry_after_s`.
    """
    epoch = contracts.epoch(operator, epoch_id)
    if epoch is None:
        raise ChainError(f"epoch {epoch_id} of {operator} is not on the chain; close it first", code="epoch_unknown")
    if epoch.is_void:
        raise ChainError(f"epoch {epoch_id} of {operator} was voided by the guardian; claim from a later one", code="epoch_void")
    left_s = epoch.activates_at_s - now_s
    if left_s > 0:
        raise ChainError(
            f"epoch {epoch_id} can still be challenged for {left_s} s; claim after that",
            code="epoch_not_active",
            retry_after_s=left_s,
        )
    return epoch


def submit_claims(
    connection: Connection,
    contracts: SettlementContracts,
    operator: str,
    epoch_id: int,
    entries: Sequence[ClaimEntry],
    created_ms: int,
) -> list[str]:
    """Write the intents that pay `entries`; the outbox waits for the challenge delay and sends them.

    Semantics: one entry becomes a `claim`, more become `claim_many` of at most `MAX_CLAIMS_IN_CALL`. The key follows from the
    rewards contract, the epoch and the entries, so asking twice changes nothing.

    Args:
        connection: In a transaction.
        operator: Whose tree it is.
        epoch_id: The epoch whose root the proofs lead to.
        entries: From `claimable`.
        created_ms: UTC milliseconds.

    Returns:
        The key of each entry's intent, in the order of the entries, for `intent_state`.
    """
    keys: list[str] = []
    for start in range(0, len(entries), MAX_CLAIMS_IN_CALL):
        claims = [_payload(entry) for entry in entries[start : start + MAX_CLAIMS_IN_CALL]]
        common = {"operator": operator, "epoch_id": str(epoch_id)}
        digest = keccak(json.dumps([common, claims], sort_keys=True).encode()).hex()
        key = f"claim:{contracts.chain.chain_id}:{contracts.addresses.rewards}:{epoch_id}:{digest}"
        if len(claims) == 1:
            submit_intent(connection, "claim", key, {**common, **claims[0]}, created_ms=created_ms)
        else:
            submit_intent(connection, "claim_many", key, {**common, "claims": claims}, created_ms=created_ms)
        keys.extend([key] * len(claims))
    return keys


def _payload(entry: ClaimEntry) -> dict[str, object]:
    proof = ["0x" + item.hex() for item in entry.proof]
    return {"account": entry.account, "cumulative": str(entry.cumulative_wei), "proof": proof}
