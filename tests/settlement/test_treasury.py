"""The whole settlement room as a node opens it: keys, chain, ledger, desk, epochs, outbox."""

import asyncio
import base64
import io
import json
import secrets
import time

import pytest

from attribution.fees import Contribution, Price, SplitPolicy
from attribution.payer import Payer
from attribution.record import RecipeTerm
from attribution.voucher import escrow_domain
from node.config import load_settings
from node.errors import ChainError
from node.operations import settlement_operations
from node.settlement import treasury as treasury_module
from node.settlement.admission import Admission, Outcome
from node.settlement.keys import KeyDirectory
from node.settlement.rails import FUNDER
from node.settlement.signer import LocalSigner
from node.settlement.treasury import open_treasury
from node.settlement.vouchers import parse_voucher
from node.settlement.wallet import Wallet
from node.telemetry.logs import make_logger

TRAINER, MAKER = "0x" + "11" * 20, "0x" + "22" * 20
PRICE = Price("1000", "3000")


def settings_of(tmp_path, **changes):
    keys = KeyDirectory(tmp_path / "keys", scrypt_n=2)
    keys.open()
    if not keys.has(FUNDER):
        keys.create(FUNDER)
    return load_settings(None, {"data_dir": tmp_path, "chain.challenge_delay_s": 1, **changes})


@pytest.fixture
def log():
    return io.StringIO()


@pytest.fixture
def logger(log):
    return make_logger("debug", "json", log)


def events(log):
    return [json.loads(line)["event"] for line in log.getvalue().splitlines()]


def admission(treasury, request_id, voucher=None, digest=None):
    return Admission(
        request_id=request_id,
        tenant="t",
        base_id="b" * 64,
        prompts=[[1, 2]],
        terms=(RecipeTerm("a" * 64, "c" * 64, "1"),),
        contributions=(Contribution("a" * 64, TRAINER, ((MAKER, 1_000_000),)),),
        price=PRICE,
        policy=SplitPolicy(500_000, 200_000, 300_000),
        payees=treasury.payees,
        voucher=voucher,
        voucher_digest=digest,
    )


async def serve_paid(treasury, payer, request_id):
    """One request as the API serves it: reserve, admit, close, settle."""
    settlement = treasury.settled()
    header = payer.header(10_000, int(time.time()) + 86_400)
    voucher = parse_voucher(json.loads(base64.urlsafe_b64decode(header)))
    digest = await settlement.desk.reserve(request_id, voucher, 10_000)
    await treasury.ledger.admit(admission(treasury, request_id, voucher, digest))
    signed = await treasury.ledger.close(Outcome(request_id=request_id, status="ok", finish_reason="stop", outputs=((5,),)))
    settlement.desk.settle(request_id, signed.fee_wei)
    payer.charge(10_000, signed.fee_wei)
    return signed.fee_wei


async def test_vouchers_become_claims_and_nothing_else_does(tmp_path, logger):
    async with open_treasury(settings_of(tmp_path), logger) as treasury:
        rails, operator = treasury.settled().rails, treasury.keys.operator.address
        wallet = Wallet(rails.chain, LocalSigner(secrets.token_bytes(32)))
        await asyncio.to_thread(rails.faucet.fund_payer, wallet, 10**9)
        payer = Payer(wallet.signer, operator, escrow_domain(rails.chain.chain_id, rails.contracts.addresses.escrow))
        paid_wei = sum([await serve_paid(treasury, payer, f"paid-{index}") for index in range(3)])
        await treasury.ledger.admit(admission(treasury, "free"))
        await treasury.ledger.close(Outcome(request_id="free", status="ok", finish_reason="stop", outputs=((5,) * 50,)))
        operations = settlement_operations(treasury)

        epoch = await operations["epochs.close"]()

        assert (epoch["state"], epoch["records"], int(epoch["total_wei"])) == ("done", 3, paid_wei)
        assert await asyncio.to_thread(rails.contracts.funded_wei, operator) == paid_wei
        on_chain = await asyncio.to_thread(rails.contracts.epoch, operator, epoch["epoch_id"])
        await asyncio.sleep(max(0.0, on_chain.activates_at_s - time.time()) + 0.1)
        claims = await operations["rewards.claim"](account=None)
        assert sum(int(claim["paid_wei"]) for claim in claims) == paid_wei
        assert {claim["state"] for claim in claims} == {"done"}
        balances = [await asyncio.to_thread(rails.contracts.token_balance_wei, claim["account"]) for claim in claims]
        assert sum(balances) == paid_wei
        assert await operations["rewards.claim"](account=None) == []

    async with open_treasury(settings_of(tmp_path), logger) as again:
        [listed] = await settlement_operations(again)["epochs.list"]()
        assert (listed["root"], listed["state"]) == (epoch["root"], "done")
        assert await again.ledger.verify_chain() == 4


async def test_without_a_chain_usage_is_recorded_and_nobody_is_paid(tmp_path, logger):
    async with open_treasury(settings_of(tmp_path, **{"chain.profile": "none"}), logger) as treasury:
        assert (treasury.settlement, treasury.payment_terms()) == (None, None)
        assert "nobody is paid" in treasury.describe()
        await treasury.ledger.admit(admission(treasury, "free"))
        signed = await treasury.ledger.close(Outcome(request_id="free", status="ok", finish_reason="stop", outputs=((5,),)))
        operations = settlement_operations(treasury)

        assert (await operations["receipts.show"](request_id="free"))["receipt"] == signed.bundle["receipt"]
        for name, arguments in (
            ("epochs.list", {}),
            ("epochs.close", {}),
            ("rewards.show", {"account": None}),
            ("rewards.claim", {"account": None}),
        ):
            with pytest.raises(ChainError) as caught:
                await operations[name](**arguments)
            assert caught.value.error_code == "chain_none"


async def test_crash_leaves_open_requests_closed_and_said(tmp_path, logger, log):
    settings = settings_of(tmp_path, **{"chain.profile": "none"})
    async with open_treasury(settings, logger) as treasury:
        await treasury.ledger.admit(admission(treasury, "running"))
    async with open_treasury(settings, logger) as treasury:
        assert (await treasury.ledger.receipt("running"))["record"]["status"] == "interrupted"
    assert "requests_interrupted" in events(log)


class StubCloser:
    """Closes epochs as a script says."""

    def __init__(self, *script):
        self.script, self.count, self.is_over = list(script), 0, asyncio.Event()

    async def close(self):
        self.count += 1
        step = self.script.pop(0)
        if not self.script:
            self.is_over.set()
        if isinstance(step, Exception):
            raise step
        return step


async def test_epoch_timer_goes_on_after_a_close_that_failed(logger, log):
    closer = StubCloser(ChainError("down"), None, ChainError("down"), None)
    settlement = treasury_module.Settlement(None, None, closer, asyncio.Event())
    stop = asyncio.Event()
    task = asyncio.create_task(treasury_module._close_regularly(0.001, settlement, stop, logger))
    async with asyncio.timeout(10):
        await closer.is_over.wait()
    stop.set()
    await task

    assert closer.count >= 4
    assert events(log) == ["epoch_not_closed", "epoch_not_closed"]
    assert not settlement.wake.is_set()


async def test_background_task_that_dies_is_reported_at_once(logger, log):
    async def defect():
        raise RuntimeError("no such table")

    task = asyncio.create_task(defect(), name="outbox")
    await asyncio.wait([task])
    treasury_module._report(task, logger)

    [line] = [json.loads(line) for line in log.getvalue().splitlines()]
    assert (line["event"], line["task"], line["level"]) == ("settlement_task_died", "outbox", "error")
    assert "no such table" in line["exception"]
