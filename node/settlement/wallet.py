"""One account that sends a transaction and waits for it: deployments, a payer's deposit, development funds.

The submitter of a running node never uses this; its transactions go through the outbox, which survives crashes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from eth_utils.crypto import keccak

from node.errors import ChainError
from node.settlement.chain import Call, Chain
from node.settlement.fees import gas_limit, initial_fees
from node.settlement.rpc_errors import Revert, SendOutcome
from node.settlement.rpc_values import TransactionReceipt
from node.settlement.signer import Signer

_SENT = (SendOutcome.ACCEPTED, SendOutcome.ALREADY_KNOWN, SendOutcome.UNKNOWN)


class Wallet:
    """A signer and a chain.

    Args:
        chain: Connected.
        signer: The account; nobody else sends from it meanwhile.
        timeout_s: How long a transaction may take to be mined.
        poll_s: Between two looks.
        clock_s: Monotonic clock.
        pause: Waits that many seconds.
    """

    def __init__(
        self,
        chain: Chain,
        signer: Signer,
        timeout_s: float = 120.0,
        poll_s: float = 0.2,
        clock_s: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.chain, self.signer = chain, signer
        self._timeout_s, self._poll_s, self._clock_s, self._pause = timeout_s, poll_s, clock_s, pause

    @property
    def address(self) -> str:
        """The account."""
        return self.signer.address

    def next_nonce(self) -> int:
        """The nonce that the next transaction will have."""
        return self.chain.nonce(self.address)

    def send(self, call: Call, what: str) -> TransactionReceipt:
        """Send one call and wait until it is mined.

        Args:
            call: What to do; an empty `to` deploys `data`.
            what: For messages: "deploy UsageEscrow".

        Raises:
            ChainError: transaction_failed when it reverts or is refused, transaction_unknown when it is not mined in time.
        """
        estimate = self.chain.estimate_gas(self.address, call)
        if isinstance(estimate, Revert):
            raise ChainError(f"cannot {what}: the contract refuses it (0x{estimate.data[:4].hex()})", code="transaction_failed")
        fees = initial_fees(self.chain.fee_market())
        raw = self.signer.sign_transaction(
            {
                "chainId": self.chain.chain_id,
                "nonce": self.next_nonce(),
                "to": call.to or b"",
                "value": call.value_wei,
                "data": call.data,
                "gas": estimate if not call.data else gas_limit(estimate),
                "maxFeePerGas": fees.max_fee_wei,
                "maxPriorityFeePerGas": fees.priority_fee_wei,
                "type": 2,
            }
        )
        outcome = self.chain.send_raw(raw)
        if outcome not in _SENT:
            raise ChainError(
                f"cannot {what}: the chain refused a transaction of {self.address} ({outcome.value}); check its balance",
                code="transaction_failed",
            )
        return self._wait(keccak(raw), what)

    def _wait(self, transaction_hash: bytes, what: str) -> TransactionReceipt:
        deadline_s = self._clock_s() + self._timeout_s
        while (receipt := self.chain.receipt(transaction_hash)) is None:
            if self._clock_s() >= deadline_s:
                raise ChainError(
                    f"cannot say whether it was possible to {what}: 0x{transaction_hash.hex()} is not mined after "
                    f"{self._timeout_s:g} s; look it up before sending anything else from {self.address}",
                    code="transaction_unknown",
                )
            self._pause(self._poll_s)
        if not receipt.has_succeeded:
            raise ChainError(f"cannot {what}: transaction 0x{transaction_hash.hex()} reverted", code="transaction_failed")
        return receipt
