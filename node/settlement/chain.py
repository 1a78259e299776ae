"""Typed calls to an EVM chain over JSON-RPC. The only importer of web3.

Blocking, one call at a time for each thread: background tasks run it on a worker thread. Answers are checked before they are
believed, nothing is retried here (a repeated send is the outbox's decision), and web3's own fetching of URLs named by contracts
(CCIP-Read) is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eth_utils.abi import abi_to_signature, function_signature_to_4byte_selector, get_abi_output_types
from requests import RequestException
from web3 import HTTPProvider, Web3
from web3.exceptions import Web3Exception
from web3.types import RPCEndpoint

from node.errors import ChainError
from node.settlement import rpc_values
from node.settlement.rpc_errors import Revert, SendOutcome, classify, is_revert
from node.settlement.rpc_session import BoundedSession, host_of
from node.settlement.rpc_values import BlockInfo, TransactionReceipt

Abi = list[dict[str, Any]]
BlockTag = int | str
MAX_CALL_RESULT_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Call:
    """A message to a contract: what a transaction does, without who pays for it."""

    to: str
    data: bytes
    value_wei: int = 0


@dataclass(frozen=True, slots=True)
class FeeMarket:
    """What gas costs now, in wei."""

    base_fee_wei: int
    priority_fee_wei: int


class RpcFailure(Exception):
    """The endpoint answered with an `error` member. Stays inside this module's callers' reach as an outcome, never as text."""

    def __init__(self, code: int, message: str, data: bytes) -> None:
        super().__init__(code)
        self.code, self.message, self.data = code, message, data


class Chain:
    """One endpoint of one chain.

    Args:
        rpc_url: http or https.
        chain_id: The chain it must be; checked by `connect` and again by `check`.
        timeout_s: For each request.
    """

    def __init__(self, rpc_url: str, chain_id: int, timeout_s: float = 10.0) -> None:
        self.chain_id = chain_id
        self._host = host_of(rpc_url)
        provider = HTTPProvider(rpc_url, session=BoundedSession(timeout_s), exception_retry_configuration=None)
        provider.global_ccip_read_enabled = False
        self._provider = provider
        self._web3 = Web3(provider, middleware=[])

    def connect(self) -> None:
        """Check that the endpoint answers for the expected chain.

        Raises:
            ChainError: chain_unreachable or chain_mismatch.
        """
        found = rpc_values.quantity(self._request("eth_chainId", []))
        if found != self.chain_id:
            raise ChainError(
                f"{self._host} serves chain {found}, not {self.chain_id}; set chain.rpc_url to an endpoint of that chain",
                code="chain_mismatch",
            )

    def head(self) -> BlockInfo:
        """The newest block."""
        return rpc_values.block(self._request("eth_getBlockByNumber", ["latest", False]))

    def block(self, tag: BlockTag) -> BlockInfo | None:
        """A block by number or tag ("safe", "finalized"); None when there is none or the tag is unknown there."""
        try:
            answer = self._ask("eth_getBlockByNumber", [_tag(tag), False])
        except RpcFailure:
            return None
        return None if answer is None else rpc_values.block(answer)

    def genesis_hash(self) -> bytes:
        """The hash of block 0: two chains may share an id, never this."""
        first = self.block(0)
        if first is None:
            raise rpc_values.malformed("a first block")
        return first.block_hash

    def nonce(self, address: str, tag: BlockTag = "latest") -> int:
        """Transactions of `address` up to that block."""
        return rpc_values.quantity(self._request("eth_getTransactionCount", [address, _tag(tag)]), rpc_values.BLOCK_LIMIT)

    def balance_wei(self, address: str, tag: BlockTag = "latest") -> int:
        """Gas money of `address`."""
        return rpc_values.quantity(self._request("eth_getBalance", [address, _tag(tag)]))

    def code(self, address: str) -> bytes:
        """The contract at `address`, empty when there is none."""
        return rpc_values.data(self._request("eth_getCode", [address, "latest"]))

    def fee_market(self) -> FeeMarket:
        """Base fee of the newest block and the endpoint's own idea of a tip."""
        tip = self._request("eth_maxPriorityFeePerGas", [])
        return FeeMarket(self.head().base_fee_wei, rpc_values.quantity(tip))

    def estimate_gas(self, sender: str, call: Call) -> int | Revert:
        """The gas a call needs now, or how it would fail."""
        try:
            return rpc_values.quantity(self._ask("eth_estimateGas", [_message(sender, call)]), rpc_values.BLOCK_LIMIT)
        except RpcFailure as failure:
            return self._revert(failure)

    def try_call(self, sender: str | None, call: Call, tag: BlockTag = "latest") -> bytes | Revert:
        """What a message would return, or how the contract would refuse it."""
        try:
            output = rpc_values.data(self._ask("eth_call", [_message(sender, call), _tag(tag)]))
        except RpcFailure as failure:
            return self._revert(failure)
        if len(output) > MAX_CALL_RESULT_BYTES:
            raise rpc_values.malformed(f"at most {MAX_CALL_RESULT_BYTES} bytes of call result")
        return output

    def send_raw(self, raw: bytes) -> SendOutcome:
        """Hand over signed bytes. Never raises for an answer or a lost connection: both are outcomes."""
        try:
            self._ask("eth_sendRawTransaction", ["0x" + raw.hex()])
        except RpcFailure as failure:
            return classify(failure.message)
        except ChainError:
            return SendOutcome.UNKNOWN
        return SendOutcome.ACCEPTED

    def receipt(self, transaction_hash: bytes) -> TransactionReceipt | None:
        """The receipt, or None while the transaction is not mined."""
        answer = self._request("eth_getTransactionReceipt", ["0x" + transaction_hash.hex()])
        return rpc_values.receipt(answer, transaction_hash)

    def read(self, address: str, abi: Abi, function: str, *arguments: Any, tag: BlockTag = "latest") -> tuple[Any, ...]:
        """Call a view function and decode what it returns.

        Raises:
            ChainError: contract_missing when nothing is at the address, transaction_failed when the contract refuses.
        """
        output = self.try_call(None, Call(address, self.encode(abi, function, *arguments)), tag)
        if isinstance(output, Revert):
            raise ChainError(f"{function} at {address} refused the call: {output.name or 'no reason'}", code="transaction_failed")
        if not output:
            raise ChainError(
                f"no contract answers at {address} on chain {self.chain_id}; check the chain.*_address settings",
                code="contract_missing",
            )
        entry: Any
        [entry] = [item for item in abi if item.get("type") == "function" and item["name"] == function]
        try:
            return self._web3.codec.decode(get_abi_output_types(entry), output)
        except (ValueError, TypeError, OverflowError) as error:
            raise rpc_values.malformed(f"the result of {function}") from error

    def encode(self, abi: Abi, function: str, *arguments: Any) -> bytes:
        """Call data of one function."""
        return bytes.fromhex(self._web3.eth.contract(abi=abi).encode_abi(function, list(arguments)).removeprefix("0x"))

    def encode_deployment(self, abi: Abi, bytecode: bytes, arguments: Sequence[Any]) -> bytes:
        """Creation code followed by the constructor's arguments."""
        constructor = self._web3.eth.contract(abi=abi, bytecode=bytecode).constructor(*arguments)
        return bytes.fromhex(str(constructor.data_in_transaction).removeprefix("0x"))

    def _revert(self, failure: RpcFailure) -> Revert:
        if is_revert(failure.code, failure.message):
            return Revert("", failure.data)
        raise self._unreachable("refused the request") from failure

    def _request(self, method: str, params: list[Any]) -> Any:
        """An answer, or a ChainError."""
        try:
            return self._ask(method, params)
        except RpcFailure as failure:
            raise self._unreachable(f"refused {method} (code {failure.code})") from failure

    def _ask(self, method: str, params: list[Any]) -> Any:
        """An answer, RpcFailure when the endpoint says no, ChainError when it says nothing sensible."""
        try:
            answer = self._provider.make_request(RPCEndpoint(method), params)
        except (RequestException, Web3Exception, OSError) as error:
            raise self._unreachable("did not answer") from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self._unreachable("did not answer with JSON") from error
        if not isinstance(answer, dict) or ("result" not in answer and "error" not in answer):
            raise self._unreachable("did not answer with JSON-RPC")
        if answer.get("error") is not None:
            raise _failure(answer["error"])
        return answer.get("result")

    def _unreachable(self, what: str) -> ChainError:
        return ChainError(f"the chain endpoint {self._host} {what}; check chain.rpc_url and the network", retry_after_s=10.0)


def error_names(*abis: Abi) -> dict[bytes, str]:
    """Selector to name of every custom error in those ABIs."""
    entries: list[Any] = [entry for abi in abis for entry in abi if entry.get("type") == "error"]
    return {function_signature_to_4byte_selector(abi_to_signature(entry)): entry["name"] for entry in entries}


def _failure(error: Any) -> RpcFailure:
    """Read an `error` member, whatever its shape; anvil and geth put revert data in `data`, others one level deeper."""
    fields = error if isinstance(error, dict) else {}
    code, message, found = fields.get("code"), fields.get("message"), fields.get("data")
    if isinstance(found, dict):
        found = found.get("data")
    try:
        payload = rpc_values.data(found)
    except ChainError:
        payload = b""
    return RpcFailure(code if isinstance(code, int) else 0, message if isinstance(message, str) else "", payload)


def _message(sender: str | None, call: Call) -> dict[str, str]:
    fields = {"data": "0x" + call.data.hex(), "value": hex(call.value_wei)}
    if call.to:
        fields["to"] = call.to
    if sender is not None:
        fields["from"] = sender
    return fields


def _tag(tag: BlockTag) -> str:
    return hex(tag) if isinstance(tag, int) else tag
