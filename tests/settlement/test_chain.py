import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from node.errors import ChainError
from node.settlement.chain import Call, Chain, FeeMarket
from node.settlement.fees import Fees, bumped_fees, gas_limit, initial_fees
from node.settlement.rpc_errors import Revert, SendOutcome, classify
from node.settlement.rpc_session import host_of

HASH = b"\x0a" * 32
RECEIPT = {
    "transactionHash": "0x" + HASH.hex(),
    "blockHash": "0x" + "0b" * 32,
    "blockNumber": "0x5",
    "status": "0x1",
    "gasUsed": "0x5208",
    "effectiveGasPrice": "0x1",
    "contractAddress": None,
}


class StubEndpoint:
    """An endpoint that says whatever a test wants: a result, an error member, or raw bytes."""

    def __init__(self):
        self.answers, self.requests, self.body, self.status = {}, [], None, 200
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append(request["method"])
                body = stub.body
                if body is None:
                    answer = stub.answers.get(request["method"], {"error": {"code": -32601, "message": "no"}})
                    body = json.dumps({"jsonrpc": "2.0", "id": request["id"], **answer}).encode()
                self.send_response(stub.status)
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                """Keep quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def chain(self):
        return Chain(f"http://127.0.0.1:{self.server.server_port}", 31_611, timeout_s=5)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def stub():
    endpoint = StubEndpoint()
    yield endpoint
    endpoint.close()


def test_connect_wrong_chain_id_is_a_mismatch(stub):
    stub.answers["eth_chainId"] = {"result": "0x1"}
    with pytest.raises(ChainError) as caught:
        stub.chain.connect()
    assert caught.value.error_code == "chain_mismatch"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>502 Bad Gateway</html>"),
        (500, b"oops"),
        (302, b""),
        (200, b""),
        (200, b"[]"),
        (200, b"null"),
        (200, b"[" * 200_000),
        (200, b'{"jsonrpc": "2.0"}'),
        (200, b'{"result": "' + b"0" * (9 << 20) + b'"}'),
    ],
)
def test_request_answered_with_nonsense_is_unreachable_and_not_repeated(stub, status, body):
    stub.status, stub.body = status, body
    with pytest.raises(ChainError) as caught:
        stub.chain.connect()
    assert caught.value.error_code == "chain_unreachable"
    assert caught.value.is_retryable
    assert stub.requests == ["eth_chainId"]


@pytest.mark.parametrize("result", ["12", "0x", "0xzz", "-0x1", "0x-1", 12, None, True, [], "0x1" + "0" * 64, "0x" + "f" * 70])
def test_quantity_that_is_none_is_a_chain_error(stub, result):
    stub.answers["eth_getBalance"] = {"result": result}
    with pytest.raises(ChainError):
        stub.chain.balance_wei("0x" + "11" * 20)


def test_receipt_missing_is_none(stub):
    stub.answers["eth_getTransactionReceipt"] = {"result": None}
    assert stub.chain.receipt(HASH) is None


def test_receipt_of_a_failed_transaction_says_so(stub):
    stub.answers["eth_getTransactionReceipt"] = {"result": {**RECEIPT, "status": "0x0"}}
    assert stub.chain.receipt(HASH).has_succeeded is False


@pytest.mark.parametrize(
    "change",
    [
        {"transactionHash": "0x" + "0c" * 32},
        {"blockHash": "0x12"},
        {"blockNumber": "0x" + "f" * 30},
        {"status": "0x2"},
        {"status": None},
        {"gasUsed": "-0x1"},
        {"gasUsed": "0x" + "f" * 40},
        {"contractAddress": "0x12"},
    ],
)
def test_receipt_of_another_or_malformed_is_a_chain_error(stub, change):
    stub.answers["eth_getTransactionReceipt"] = {"result": {**RECEIPT, **change}}
    with pytest.raises(ChainError):
        stub.chain.receipt(HASH)


@pytest.mark.parametrize(
    ("message", "outcome"),
    [
        ("already known", SendOutcome.ALREADY_KNOWN),
        ("AlreadyKnown", SendOutcome.ALREADY_KNOWN),
        ("Known transaction", SendOutcome.ALREADY_KNOWN),
        ("transaction already imported", SendOutcome.ALREADY_KNOWN),
        ("nonce too low: next nonce 5, tx nonce 4", SendOutcome.NONCE_TOO_LOW),
        ("Nonce too low", SendOutcome.NONCE_TOO_LOW),
        ("OldNonce", SendOutcome.NONCE_TOO_LOW),
        ("nonce too high", SendOutcome.NONCE_TOO_HIGH),
        ("replacement transaction underpriced", SendOutcome.UNDERPRICED),
        ("transaction underpriced: tip needed 1, tip permitted 0", SendOutcome.UNDERPRICED),
        ("max fee per gas less than block base fee: address 0x, maxFeePerGas: 1", SendOutcome.FEE_BELOW_BASE),
        ("insufficient funds for gas * price + value", SendOutcome.INSUFFICIENT_FUNDS),
        ("Upfront cost exceeds account balance", SendOutcome.INSUFFICIENT_FUNDS),
        ("exceeds block gas limit", SendOutcome.REJECTED),
        ("intrinsic gas too low", SendOutcome.REJECTED),
        ("internal error", SendOutcome.UNKNOWN),
        ("", SendOutcome.UNKNOWN),
    ],
)
def test_send_refusal_becomes_an_outcome(stub, message, outcome):
    stub.answers["eth_sendRawTransaction"] = {"error": {"code": -32000, "message": message}}
    assert stub.chain.send_raw(b"\x02") is outcome
    assert classify(message.upper()) is outcome


def test_send_lost_connection_is_unknown_and_not_repeated(stub):
    stub.status, stub.body = 504, b"timeout"
    assert stub.chain.send_raw(b"\x02") is SendOutcome.UNKNOWN
    assert stub.requests == ["eth_sendRawTransaction"]


def test_call_that_names_a_url_is_a_revert_and_nothing_is_fetched(stub):
    lookup = "0x556f1830" + "00" * 200  # OffchainLookup(address,string[],bytes,bytes4,bytes)
    stub.answers["eth_call"] = {"error": {"code": 3, "message": "execution reverted", "data": lookup}}
    outcome = stub.chain.try_call(None, Call("0x" + "11" * 20, b"\x01"))
    assert isinstance(outcome, Revert)
    assert stub.requests == ["eth_call"]


def test_read_endless_result_is_refused(stub):
    stub.answers["eth_call"] = {"result": "0x" + "ff" * (1 << 20)}
    abi = [
        {"type": "function", "name": "f", "inputs": [], "outputs": [{"name": "", "type": "uint256"}], "stateMutability": "view"}
    ]
    with pytest.raises(ChainError):
        stub.chain.read("0x" + "11" * 20, abi, "f")


def test_read_without_a_contract_is_contract_missing(stub):
    stub.answers["eth_call"] = {"result": "0x"}
    abi = [
        {"type": "function", "name": "f", "inputs": [], "outputs": [{"name": "", "type": "uint256"}], "stateMutability": "view"}
    ]
    with pytest.raises(ChainError) as caught:
        stub.chain.read("0x" + "11" * 20, abi, "f")
    assert caught.value.error_code == "contract_missing"


@pytest.mark.parametrize("error", [None, "text", {"code": "x"}, {"message": 5}, {"data": 7}, [1]])
def test_error_member_of_any_shape_is_a_chain_error(stub, error):
    stub.answers["eth_blockNumber"] = {}
    stub.answers["eth_getCode"] = {"error": error, **({"result": 5} if error is None else {})}
    with pytest.raises(ChainError):
        stub.chain.code("0x" + "11" * 20)


def test_finalized_tag_unknown_to_the_endpoint_is_none(stub):
    assert stub.chain.block("finalized") is None


def test_message_names_the_host_without_its_secrets():
    assert host_of("https://user:secret@rpc.example:8443/v3/key?token=1") == "https://rpc.example:8443"


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 10**9, 2**200 + 1])
def test_bumped_fees_rise_by_an_eighth_rounded_up_and_reach_the_market(start):
    fees = Fees(start, start)
    bumped = bumped_fees(fees, FeeMarket(0, 0))
    assert bumped.max_fee_wei * 8 >= start * 9
    assert bumped.max_fee_wei > start
    assert bumped.priority_fee_wei <= bumped.max_fee_wei
    assert bumped_fees(fees, FeeMarket(2**210, 5)).max_fee_wei >= initial_fees(FeeMarket(2**210, 5)).max_fee_wei


def test_gas_limit_rounds_up():
    assert gas_limit(1) == 2
    assert gas_limit(100_000) == 120_000
