"""The development chain's JSON-RPC methods: those a web3 client needs to read and to send raw transactions, and no others.

No account lives in here and nothing is signed here, so a client has to take the same path as on a public chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from eth.abc import BlockAPI

from node.settlement.embedded_chain_evm import BLOCK_GAS_LIMIT, CallResult, Evm, TransactionRefused
from node.settlement.embedded_chain_json import (
    JsonObject,
    block_json,
    effective_gas_price,
    log_json,
    receipt_json,
    to_hex,
    transaction_json,
)
from node.settlement.embedded_chain_log import BlockLog, LoggedBlock

MAX_LOGS = 10_000
MAX_FEE_HISTORY_BLOCKS = 1024
MAX_RAW_TRANSACTION_BYTES = 128 * 1024
PRIORITY_FEE_WEI = 1_000_000_000
_HEAD_TAGS = ("latest", "safe", "finalized")  # every block is final at once: nothing competes with this chain


class RpcError(Exception):
    """An answer with an `error` member, as Ethereum's JSON-RPC numbers them."""

    def __init__(self, code: int, message: str, data: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.data = code, message, data


class ChainRpc:
    """Answers one method at a time; the caller keeps calls in one thread.

    Args:
        evm: The chain, already replayed.
        log: Where a block is written before its hash is answered.
        now_s: UTC clock in whole seconds.
    """

    def __init__(self, evm: Evm, log: BlockLog, now_s: Callable[[], int]) -> None:
        self._evm, self._log, self._now_s = evm, log, now_s
        self._methods: dict[str, Callable[..., Any]] = {
            "eth_chainId": lambda: hex(evm.chain_id),
            "net_version": lambda: str(evm.chain_id),
            "web3_clientVersion": lambda: "openlora-development-chain/1",
            "eth_syncing": lambda: False,
            "eth_accounts": list,
            "eth_blockNumber": lambda: hex(evm.head.block_number),
            "eth_gasPrice": lambda: hex(evm.next_base_fee + PRIORITY_FEE_WEI),
            "eth_maxPriorityFeePerGas": lambda: hex(PRIORITY_FEE_WEI),
            "eth_feeHistory": self._fee_history,
            "eth_getBlockByNumber": self._block_by_number,
            "eth_getBlockByHash": self._block_by_hash,
            "eth_getBalance": lambda address, block="latest": hex(self._state(block).get_balance(_address(address))),
            "eth_getTransactionCount": lambda address, block="latest": hex(self._state(block).get_nonce(_address(address))),
            "eth_getCode": lambda address, block="latest": to_hex(self._state(block).get_code(_address(address))),
            "eth_call": self._call,
            "eth_estimateGas": self._estimate_gas,
            "eth_sendRawTransaction": self._send_raw,
            "eth_getTransactionByHash": self._transaction,
            "eth_getTransactionReceipt": self._receipt,
            "eth_getLogs": self._logs,
        }

    def answer(self, method: str, params: list[Any]) -> Any:
        """The `result` of one request.

        Raises:
            RpcError: Unknown method, bad parameters, a refused or reverting transaction.
        """
        handler = self._methods.get(method)
        if handler is None:
            raise RpcError(-32601, f"the method {method[:64]} does not exist")
        try:
            return handler(*params)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise RpcError(-32602, f"invalid params for {method}") from error

    def _send_raw(self, raw_hex: str) -> str:
        raw = _bytes(raw_hex)
        if len(raw) > MAX_RAW_TRANSACTION_BYTES:
            raise RpcError(-32000, "oversized data")
        try:
            block = self._evm.mine(raw, self._now_s())
        except TransactionRefused as refused:
            raise RpcError(-32000, refused.reason) from refused
        self._log.append(LoggedBlock(block.header.timestamp, block.hash, raw).to_bytes())
        return to_hex(block.transactions[0].hash)

    def _call(self, fields: JsonObject, block: Any = "latest", *_overrides: Any) -> str:
        # `latest` sees the pending block's time: on an idle chain a delay would otherwise never be seen to pass.
        is_head = block in ("latest", "pending")
        result = self._evm.call(_message(fields), self._number(block), self._now_s() if is_head else None)
        return to_hex(_succeeded(result))

    def _estimate_gas(self, fields: JsonObject, _block: Any = "latest", *_overrides: Any) -> str:
        message, now_s = _message(fields), self._now_s()
        _succeeded(self._evm.call(message, self._evm.head.block_number, now_s))
        return hex(min(self._evm.estimate_gas(message, now_s), BLOCK_GAS_LIMIT))

    def _transaction(self, transaction_hash: str) -> JsonObject | None:
        located = self._evm.find(_hash(transaction_hash))
        return None if located is None else transaction_json(located.transaction, located.block, located.index)

    def _receipt(self, transaction_hash: str) -> JsonObject | None:
        located = self._evm.find(_hash(transaction_hash))
        return None if located is None else receipt_json(located)

    def _block_by_number(self, tag: Any, is_full: bool = False) -> JsonObject | None:
        if tag == "pending":
            return block_json(self._evm.pending_block(self._now_s()), is_full, is_pending=True)
        block = self._evm.block_by_number(self._number(tag))
        return None if block is None else block_json(block, is_full)

    def _block_by_hash(self, block_hash: str, is_full: bool = False) -> JsonObject | None:
        block = self._evm.block_by_hash(_hash(block_hash))
        return None if block is None else block_json(block, is_full)

    def _fee_history(self, count: Any, newest: Any, percentiles: list[float] | None = None) -> JsonObject:
        block_count = count if isinstance(count, int) else int(count, 16)
        last = self._number(newest)
        first = max(0, last + 1 - min(max(block_count, 1), MAX_FEE_HISTORY_BLOCKS))
        blocks = [self._mined(number) for number in range(first, last + 1)]
        fees = [block.header.base_fee_per_gas for block in blocks]
        following = self._evm.block_by_number(last + 1)
        fees.append(self._evm.next_base_fee if following is None else following.header.base_fee_per_gas)
        return {
            "oldestBlock": hex(first),
            "baseFeePerGas": [hex(fee) for fee in fees],
            "gasUsedRatio": [block.header.gas_used / block.header.gas_limit for block in blocks],
            "reward": [[hex(_tip(block))] * len(percentiles or []) for block in blocks],
        }

    def _logs(self, query: JsonObject) -> list[JsonObject]:
        found: list[JsonObject] = []
        for block in self._blocks_of(query):
            receipts = self._evm.receipts(block)
            for index in range(len(receipts)):
                found.extend(log for log in log_json(block, receipts, index) if _matches(log, query))
            if len(found) > MAX_LOGS:
                raise RpcError(-32005, f"query returned more than {MAX_LOGS} results; ask for fewer blocks")
        return found

    def _blocks_of(self, query: JsonObject) -> Iterator[BlockAPI]:
        if "blockHash" in query:
            block = self._evm.block_by_hash(_hash(query["blockHash"]))
            if block is None:
                raise RpcError(-32000, "unknown block")
            yield block
            return
        last = min(self._number(query.get("toBlock", "latest")), self._evm.head.block_number)
        for number in range(self._number(query.get("fromBlock", "latest")), last + 1):
            yield self._mined(number)

    def _mined(self, number: int) -> BlockAPI:
        block = self._evm.block_by_number(number)
        if block is None:
            raise RpcError(-32000, "header not found")
        return block

    def _state(self, tag: Any) -> Any:
        return self._evm.state_at(self._mined(self._number(tag)).number)

    def _number(self, tag: Any) -> int:
        if tag in _HEAD_TAGS or tag == "pending":
            return int(self._evm.head.block_number)
        if tag == "earliest":
            return 0
        number = int(tag, 16)
        if number < 0:
            raise ValueError(number)
        return number


def _succeeded(result: CallResult) -> bytes:
    if result.is_reverted:
        raise RpcError(3, result.failure, to_hex(result.output))
    return result.output


def _tip(block: BlockAPI) -> int:
    if not block.transactions:
        return 0
    return effective_gas_price(block.transactions[0], block) - int(block.header.base_fee_per_gas)


def _message(fields: JsonObject) -> dict[str, Any]:
    """A call's fields as py-evm wants them."""
    data = fields.get("input") or fields.get("data") or "0x"
    return {
        "from": _address(fields["from"]) if fields.get("from") else None,
        "to": _address(fields["to"]) if fields.get("to") else None,
        "gas": int(fields["gas"], 16) if fields.get("gas") else None,
        "value": int(fields["value"], 16) if fields.get("value") else 0,
        "data": _bytes(data),
    }


def _matches(log: JsonObject, query: JsonObject) -> bool:
    addresses = query.get("address")
    if addresses is not None:
        wanted = [addresses] if isinstance(addresses, str) else addresses
        if log["address"].lower() not in [address.lower() for address in wanted]:
            return False
    topics = query.get("topics") or []
    if len(topics) > len(log["topics"]):
        return False
    return all(_topic_matches(wanted, topic) for wanted, topic in zip(topics, log["topics"], strict=False))


def _topic_matches(wanted: Any, topic: str) -> bool:
    if wanted is None:
        return True
    return topic in [item.lower() for item in ([wanted] if isinstance(wanted, str) else wanted)]


def _bytes(text: str) -> bytes:
    if not text.startswith("0x"):
        raise ValueError(text[:16])
    return bytes.fromhex(text[2:])


def _address(text: str) -> bytes:
    return _exactly(text, 20)


def _hash(text: str) -> bytes:
    return _exactly(text, 32)


def _exactly(text: str, length: int) -> bytes:
    data = _bytes(text)
    if len(data) != length:
        raise ValueError(text[:80])
    return data
