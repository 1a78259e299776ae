"""What an endpoint's refusal of a transaction means for its sender.

Nodes agree on no error codes for these, only on words, so the words of geth, reth, Besu, Nethermind, Erigon, anvil and the
development chain are matched here and nowhere else. What no word matches is UNKNOWN, which is never answered by a new nonce.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class SendOutcome(Enum):
    """What became of raw bytes that were handed to an endpoint."""

    ACCEPTED = "accepted"
    ALREADY_KNOWN = "already_known"  # the endpoint has these bytes: as good as accepted
    NONCE_TOO_LOW = "nonce_too_low"  # mined already, ours or another's: ask by hash
    NONCE_TOO_HIGH = "nonce_too_high"  # an earlier one is missing there: send that again first
    UNDERPRICED = "underpriced"  # a replacement needs higher fees, or the pool's floor is higher
    FEE_BELOW_BASE = "fee_below_base"  # the fee cap is under the block's base fee: re-price
    INSUFFICIENT_FUNDS = "insufficient_funds"  # pause and tell the operator
    REJECTED = "rejected"  # these bytes can never be mined
    UNKNOWN = "unknown"  # no clear answer: the bytes may be on their way


_WORDS: tuple[tuple[SendOutcome, tuple[str, ...]], ...] = (
    (SendOutcome.ALREADY_KNOWN, ("already known", "already imported", "alreadyknown", "known transaction", "already exists")),
    (SendOutcome.UNDERPRICED, ("underpriced", "fee too low to replace", "replacement transaction", "below configured minimum")),
    (
        SendOutcome.NONCE_TOO_LOW,
        ("nonce too low", "nonce is too low", "oldnonce", "nonce_too_low", "nonce has already been used"),
    ),
    (SendOutcome.NONCE_TOO_HIGH, ("nonce too high", "nonce gap", "nonce_too_high")),
    (
        SendOutcome.FEE_BELOW_BASE,
        ("less than block base fee", "fee cap less than", "max fee per gas less", "below current base fee", "feecap too low"),
    ),
    (SendOutcome.INSUFFICIENT_FUNDS, ("insufficient funds", "insufficient balance", "upfront cost exceeds", "insufficientfunds")),
    (
        SendOutcome.REJECTED,
        (
            "exceeds block gas limit",
            "intrinsic gas too low",
            "invalid sender",
            "invalid chain id",
            "cannot decode",
            "oversized data",
            "invalid transaction",
            "transaction type not supported",
            "max initcode size",
            "tip above fee cap",
            "higher than max fee",
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Revert:
    """A message that a contract refused.

    Args:
        name: The contract's error (`NothingToClaim`), "Error" with a reason string, "Panic", or "" when it gave none.
        data: The error's raw bytes, selector included.
    """

    name: str
    data: bytes


def classify(message: str) -> SendOutcome:
    """Read an error message of eth_sendRawTransaction."""
    text = message.lower()
    for outcome, words in _WORDS:
        if any(word in text for word in words):
            return outcome
    return SendOutcome.UNKNOWN


def is_revert(code: int, message: str) -> bool:
    """Whether an error of eth_call or eth_estimateGas says that the contract refused."""
    text = message.lower()
    return code == 3 or "revert" in text or "invalid opcode" in text or "vm execution error" in text
