"""What an endpoint answered, as typed values. Endpoints are strangers: every member is checked before it is believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from node.errors import ChainError

WORD_LIMIT = 1 << 256
BLOCK_LIMIT = 1 << 63
Answer = Any


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """A block as far as the node needs it."""

    number: int
    block_hash: bytes
    parent_hash: bytes
    timestamp_s: int
    base_fee_wei: int


@dataclass(frozen=True, slots=True)
class TransactionReceipt:
    """A mined transaction: where, and whether it succeeded."""

    transaction_hash: bytes
    block_number: int
    block_hash: bytes
    has_succeeded: bool
    gas_used: int
    gas_price_wei: int
    contract_address: str | None


def quantity(value: Answer, limit: int = WORD_LIMIT) -> int:
    """A 0x quantity below `limit`."""
    if not isinstance(value, str) or not value.startswith("0x") or len(value) > 66:
        raise malformed("a quantity")
    try:
        number = int(value[2:], 16)
    except ValueError as error:
        raise malformed("a quantity") from error
    if not 0 <= number < limit:
        raise malformed("a quantity in range")
    return number


def data(value: Answer, length: int | None = None) -> bytes:
    """0x data, of exactly `length` bytes when given."""
    if not isinstance(value, str) or not value.startswith("0x"):
        raise malformed("0x data")
    try:
        decoded = bytes.fromhex(value[2:])
    except ValueError as error:
        raise malformed("0x data") from error
    if length is not None and len(decoded) != length:
        raise malformed(f"{length} bytes of data")
    return decoded


def block(value: Answer) -> BlockInfo:
    """A block of eth_getBlockBy*."""
    fields = _object(value, "a block")
    return BlockInfo(
        quantity(fields.get("number"), BLOCK_LIMIT),
        data(fields.get("hash"), 32),
        data(fields.get("parentHash"), 32),
        quantity(fields.get("timestamp"), BLOCK_LIMIT),
        quantity(fields.get("baseFeePerGas", "0x0")),
    )


def receipt(value: Answer, transaction_hash: bytes) -> TransactionReceipt | None:
    """The receipt of that very transaction, or None while it has none."""
    if value is None:
        return None
    fields = _object(value, "a receipt")
    if data(fields.get("transactionHash"), 32) != transaction_hash:
        raise malformed("the receipt that was asked for")
    if fields.get("blockHash") is None:
        return None  # some nodes answer for transactions that are still pending
    status = quantity(fields.get("status"), 2)
    created = fields.get("contractAddress")
    return TransactionReceipt(
        transaction_hash,
        quantity(fields.get("blockNumber"), BLOCK_LIMIT),
        data(fields.get("blockHash"), 32),
        status == 1,
        quantity(fields.get("gasUsed"), BLOCK_LIMIT),
        quantity(fields.get("effectiveGasPrice", "0x0")),
        None if created is None else "0x" + data(created, 20).hex(),
    )


def malformed(expected: str) -> ChainError:
    """The error for an answer that is not what the method promises."""
    return ChainError(
        f"the chain's endpoint answered with something other than {expected}; check chain.rpc_url or use another endpoint",
        retry_after_s=10.0,
    )


def _object(value: Answer, expected: str) -> dict[str, Answer]:
    if not isinstance(value, dict):
        raise malformed(expected)
    return value
