"""Blocks, transactions, receipts and logs of the development chain in Ethereum's JSON shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from eth._utils.address import generate_contract_address
from eth.abc import BlockAPI, ReceiptAPI, SignedTransactionAPI
from eth_utils.address import to_checksum_address

from node.settlement.embedded_chain_evm import Located

JsonObject = dict[str, Any]


def to_hex(data: bytes) -> str:
    """Bytes as 0x text."""
    return "0x" + bytes(data).hex()


def _address(data: bytes) -> str | None:
    return to_checksum_address(data) if data else None


def block_json(block: BlockAPI, is_full: bool, is_pending: bool = False) -> JsonObject:
    """A block; with its transactions in full or by hash. A pending block has neither hash nor number of its own yet."""
    header = block.header
    transactions = [
        transaction_json(transaction, block, index) if is_full else to_hex(transaction.hash)
        for index, transaction in enumerate(block.transactions)
    ]
    return {
        "number": hex(header.block_number),
        "hash": None if is_pending else to_hex(header.hash),
        "parentHash": to_hex(header.parent_hash),
        "nonce": to_hex(header.nonce),
        "sha3Uncles": to_hex(header.uncles_hash),
        "logsBloom": f"0x{header.bloom:0512x}",
        "transactionsRoot": to_hex(header.transaction_root),
        "stateRoot": to_hex(header.state_root),
        "receiptsRoot": to_hex(header.receipt_root),
        "miner": _address(header.coinbase),
        "difficulty": "0x0",
        "totalDifficulty": "0x0",
        "extraData": to_hex(header.extra_data),
        "size": "0x0",
        "mixHash": to_hex(header.mix_hash),
        "gasLimit": hex(header.gas_limit),
        "gasUsed": hex(header.gas_used),
        "timestamp": hex(header.timestamp),
        "baseFeePerGas": hex(header.base_fee_per_gas),
        "transactions": transactions,
        "uncles": [],
        "withdrawals": [],
    }


def transaction_json(transaction: SignedTransactionAPI, block: BlockAPI, index: int) -> JsonObject:
    """A mined transaction."""
    type_id = getattr(transaction, "type_id", None) or 0
    fields: JsonObject = {
        "hash": to_hex(transaction.hash),
        "type": hex(type_id),
        "nonce": hex(transaction.nonce),
        "blockHash": to_hex(block.hash),
        "blockNumber": hex(block.number),
        "transactionIndex": hex(index),
        "from": _address(transaction.sender),
        "to": _address(transaction.to),
        "value": hex(transaction.value),
        "gas": hex(transaction.gas),
        "gasPrice": hex(effective_gas_price(transaction, block)),
        "input": to_hex(transaction.data),
        "v": hex(transaction.v if type_id == 0 else transaction.y_parity),
        "r": hex(transaction.r),
        "s": hex(transaction.s),
    }
    if type_id >= 2:
        fields["maxFeePerGas"] = hex(transaction.max_fee_per_gas)
        fields["maxPriorityFeePerGas"] = hex(transaction.max_priority_fee_per_gas)
    if type_id >= 1:
        fields["chainId"] = hex(transaction.chain_id)
        fields["accessList"] = []
    return fields


def effective_gas_price(transaction: SignedTransactionAPI, block: BlockAPI) -> int:
    """What a unit of gas cost, in wei (EIP-1559)."""
    base_fee = block.header.base_fee_per_gas
    return int(base_fee + min(transaction.max_priority_fee_per_gas, transaction.max_fee_per_gas - base_fee))


def receipt_json(located: Located) -> JsonObject:
    """A mined transaction's receipt with its logs."""
    transaction, block, index = located.transaction, located.block, located.index
    used_before = located.receipts[index - 1].gas_used if index else 0
    is_creation = not transaction.to
    created = generate_contract_address(transaction.sender, transaction.nonce) if is_creation else b""
    return {
        "transactionHash": to_hex(transaction.hash),
        "transactionIndex": hex(index),
        "blockHash": to_hex(block.hash),
        "blockNumber": hex(block.number),
        "from": _address(transaction.sender),
        "to": _address(transaction.to),
        "cumulativeGasUsed": hex(located.receipt.gas_used),
        "gasUsed": hex(located.receipt.gas_used - used_before),
        "effectiveGasPrice": hex(effective_gas_price(transaction, block)),
        "contractAddress": _address(created),
        "logs": list(log_json(block, located.receipts, index)),
        "logsBloom": f"0x{located.receipt.bloom:0512x}",
        "status": "0x1" if located.receipt.state_root == b"\x01" else "0x0",
        "type": hex(getattr(transaction, "type_id", None) or 0),
    }


def log_json(block: BlockAPI, receipts: Sequence[ReceiptAPI], index: int) -> Iterator[JsonObject]:
    """The logs of one transaction, numbered through the block."""
    first = sum(len(receipt.logs) for receipt in receipts[:index])
    for offset, log in enumerate(receipts[index].logs):
        yield {
            "address": _address(log.address),
            "topics": [f"0x{topic:064x}" for topic in log.topics],
            "data": to_hex(log.data),
            "blockNumber": hex(block.number),
            "blockHash": to_hex(block.hash),
            "transactionHash": to_hex(block.transactions[index].hash),
            "transactionIndex": hex(index),
            "logIndex": hex(first + offset),
            "removed": False,
        }
