"""What each kind of intent means on chain: the call that does it, how to see that it is done, and what a refusal means.

Every call is idempotent on chain (amounts are cumulative, epoch ids count up, a hash registers once), so "is it done already?"
has an answer even after the local database was restored from an old backup. `deposit` is the exception: only its nonce keeps it
single.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from node.settlement.chain import Call
from node.settlement.outbox_store import Intent
from node.settlement.rpc_errors import Revert
from node.settlement.settlement_contracts import ClaimEntry, EpochSubmission, SettlementContracts, SignedVoucher

# Refusals that time or an earlier transaction cures.
_CURABLE = {"EpochNotActive", "EpochOutOfOrder", "TotalAboveFunded", "UnknownEpoch"}


class Progress(Enum):
    """How an intent stands on chain."""

    TO_DO = "to_do"
    DONE = "done"
    IMPOSSIBLE = "impossible"  # the chain holds something else in its place


class IntentMalformed(Exception):
    """The payload does not describe a call of its kind."""


class IntentCalls:
    """Payloads to calls.

    Args:
        contracts: Deployed and verified.
    """

    def __init__(self, contracts: SettlementContracts) -> None:
        self.contracts = contracts

    def call(self, intent: Intent) -> Call:
        """The call that carries an intent out.

        Raises:
            IntentMalformed: Unknown kind, or a member is missing or no number, address or hex text.
        """
        builders = {
            "collect": self._collect,
            "submit_epoch": self._submit_epoch,
            "claim": self._claim,
            "claim_many": self._claim_many,
            "register_adapter": self._register_adapter,
            "deposit": self._deposit,
        }
        try:
            return builders[intent.kind](intent.payload)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntentMalformed(intent.key) from error

    def progress(self, intent: Intent) -> Progress:
        """Ask the chain whether an intent is done.

        Raises:
            ChainError: The chain cannot be asked.
        """
        payload, contracts = intent.payload, self.contracts
        if intent.kind == "collect":
            collected_wei = contracts.collected_wei(payload["payer"], payload["operator"])
            return _done_if(collected_wei >= int(payload["cumulative_used"]))
        if intent.kind == "submit_epoch":
            epoch = contracts.epoch(payload["operator"], int(payload["epoch_id"]))
            if epoch is None:
                return Progress.TO_DO
            return Progress.DONE if epoch.root == _bytes(payload["root"]) else Progress.IMPOSSIBLE
        if intent.kind == "claim":
            return _done_if(self._is_claimed(payload["operator"], payload))
        if intent.kind == "claim_many":
            return _done_if(all(self._is_claimed(payload["operator"], entry) for entry in payload["claims"]))
        if intent.kind == "register_adapter":
            adapter = contracts.adapter(_bytes(payload["adapter_id"]))
            if adapter is None:
                return Progress.TO_DO
            return Progress.DONE if adapter.trainer.lower() == payload["trainer"].lower() else Progress.IMPOSSIBLE
        return Progress.TO_DO

    def named(self, revert: Revert) -> Revert:
        """The same revert with the contract's own name for it."""
        return self.contracts.named(revert)

    @staticmethod
    def is_curable(revert: Revert) -> bool:
        """Whether waiting may turn that refusal into success."""
        return revert.name in _CURABLE

    def _is_claimed(self, operator: str, entry: dict[str, Any]) -> bool:
        return self.contracts.claimed_wei(operator, entry["account"]) >= int(entry["cumulative"])

    def _deposit(self, payload: dict[str, Any]) -> Call:
        return self.contracts.deposit(payload["payer"], int(payload["amount"]))

    def _collect(self, payload: dict[str, Any]) -> Call:
        voucher = SignedVoucher(
            payload["payer"],
            payload["operator"],
            int(payload["cumulative"]),
            int(payload["deadline"]),
            _bytes(payload["payer_signature"]),
        )
        return self.contracts.collect(voucher, int(payload["cumulative_used"]), _bytes(payload["operator_signature"]))

    def _submit_epoch(self, payload: dict[str, Any]) -> Call:
        return self.contracts.submit_epoch(
            EpochSubmission(
                payload["operator"],
                int(payload["epoch_id"]),
                _bytes(payload["root"]),
                _bytes(payload["receipts_root"]),
                _bytes(payload["leaves_hash"]),
                int(payload["total_cumulative"]),
                _bytes(payload["operator_signature"]),
            )
        )

    def _claim(self, payload: dict[str, Any]) -> Call:
        return self.contracts.claim(payload["operator"], int(payload["epoch_id"]), _entry(payload))

    def _claim_many(self, payload: dict[str, Any]) -> Call:
        entries = [_entry(entry) for entry in payload["claims"]]
        return self.contracts.claim_many(payload["operator"], int(payload["epoch_id"]), entries)

    def _register_adapter(self, payload: dict[str, Any]) -> Call:
        return self.contracts.register_adapter(
            _bytes(payload["adapter_id"]),
            _bytes(payload["manifest_hash"]),
            _bytes(payload["base_id"]),
            payload["trainer"],
            payload["uri"],
            _bytes(payload["trainer_signature"]),
        )


def _entry(payload: dict[str, Any]) -> ClaimEntry:
    return ClaimEntry(payload["account"], int(payload["cumulative"]), tuple(_bytes(item) for item in payload["proof"]))


def _done_if(is_done: bool) -> Progress:
    return Progress.DONE if is_done else Progress.TO_DO


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.removeprefix("0x"))
