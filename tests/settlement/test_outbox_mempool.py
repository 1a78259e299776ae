"""Replacements against a pool with geth's rule: both fees at least 10 % higher, or "replacement transaction underpriced".

The development chain mines at once and never replaces, so an endpoint stands in front of it that keeps one transaction for each
nonce until it is told to mine.
"""

import json
import threading
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from eth_account.typed_transactions import TypedTransaction
from hexbytes import HexBytes

from node.settlement.chain import Chain


class PoolEndpoint:
    """JSON-RPC in front of a chain; `mine` hands over what is pooled, `tip_wei` is what it advises."""

    def __init__(self, world):
        self.target = world.chain
        self.pool, self.refusals, self.tip_wei = {}, [], 1_000_000_007
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = endpoint.answer(request["method"], request["params"])
                body = json.dumps({"jsonrpc": "2.0", "id": request["id"], **answer}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                """Keep quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.chain = Chain(f"http://127.0.0.1:{self.server.server_port}", self.target.chain_id)

    def answer(self, method, params):
        if method == "eth_maxPriorityFeePerGas":
            return {"result": hex(self.tip_wei)}
        if method == "eth_sendRawTransaction":
            return self.keep(params[0])
        return self.target._provider.make_request(method, params)

    def keep(self, raw):
        fields = TypedTransaction.from_bytes(HexBytes(raw)).as_dict()
        fees = (fields["maxFeePerGas"], fields["maxPriorityFeePerGas"])
        if fields["nonce"] in self.pool:
            known_raw, known = self.pool[fields["nonce"]]
            if known_raw == raw:
                return {"error": {"code": -32000, "message": "already known"}}
            if any(new < Fraction(110, 100) * old for new, old in zip(fees, known, strict=True)):
                self.refusals.append((known, fees))
                return {"error": {"code": -32000, "message": "replacement transaction underpriced"}}
        self.pool[fields["nonce"]] = (raw, fees)
        return {"result": "0x" + "00" * 32}

    def mine(self):
        for raw, _ in self.pool.values():
            self.target._request("eth_sendRawTransaction", [raw])
        self.pool.clear()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def pool(chain_world):
    endpoint = PoolEndpoint(chain_world)
    yield endpoint
    endpoint.close()


@pytest.mark.parametrize("tip_wei", [0, 1, 7, 999_999_999_999])
def test_every_replacement_is_accepted_at_once_and_the_call_happens_once(chain_world, pool, tip_wei):
    world, pool.tip_wei = chain_world, tip_wei
    world.fund_payer(1_000)
    key = world.collect(10)
    outbox = world.outbox(pool.chain, resend_ms=1_000, bump_ms=5_000, max_fee_wei=10**18)
    outbox.run_once()
    for _ in range(6):
        world.clock.now_ms += 5_000
        outbox.run_once()
        pool.tip_wei = pool.tip_wei * 103 // 100  # a market that rises by less than the rule asks

    assert pool.refusals == []
    assert len(world.rows("chain_attempt")) == 7
    pool.mine()
    outbox.run_once()
    assert world.state(key) == "done"
    assert world.chain.nonce(world.submitter.address) == 1


def test_underpriced_replacement_by_a_pool_that_asks_more_is_bumped_again_later(chain_world, pool):
    world = chain_world
    world.fund_payer(1_000)
    key = world.collect(10)
    outbox = world.outbox(pool.chain, resend_ms=1_000, bump_ms=5_000)
    outbox.run_once()
    [(nonce, (raw, (fee, tip)))] = pool.pool.items()
    pool.pool[nonce] = (raw, (fee * 2, tip * 2))  # as if another endpoint had seen a dearer version

    for _ in range(9):
        world.clock.now_ms += 5_000
        outbox.run_once()
    assert pool.refusals
    pool.mine()
    outbox.run_once()

    assert world.state(key) == "done"
    assert world.chain.nonce(world.submitter.address) == 1
