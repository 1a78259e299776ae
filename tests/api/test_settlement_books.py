"""The books over the real ledger: what was served ends as one signed record, and what the desk held is let go."""

from __future__ import annotations

import base64
import itertools
import json
from dataclasses import replace

import msgspec
import pytest

from attribution import receipt
from attribution.fees import Payees, Price, SplitPolicy
from attribution.signing import LocalSigner
from attribution.voucher import Voucher, escrow_domain
from node.api.doors import Closing, Opening, RecipeEntry
from node.api.settlement_books import SettlementBooks
from node.api.voucher_header import read_voucher
from node.errors import LedgerError, PaymentError
from node.settlement.admission import SignedVoucher
from node.settlement.ledger import Ledger
from node.settlement.vouchers import VoucherDesk

PRICE = Price("10", "100")
VOUCHER = SignedVoucher("0x" + "11" * 20, "0x" + "22" * 20, 1 << 70, 4102444800, b"\x01" * 65)


class FakeDesk:
    def __init__(self):
        self.held, self.fees, self.released, self.fault = {}, {}, [], None

    async def reserve(self, request_id, voucher, amount_wei):
        if self.fault is not None:
            raise self.fault
        self.held[request_id] = amount_wei
        return "d" * 64

    def settle(self, request_id, fee_wei):
        del self.held[request_id]
        self.fees[request_id] = fee_wei

    def release(self, request_id):
        self.released.append(request_id)
        self.held.pop(request_id, None)


@pytest.fixture
async def ledger(tmp_path):
    clock = itertools.count(1_700_000_000_000)
    ledger = Ledger(
        f"sqlite:///{tmp_path / 'ledger.sqlite'}", clock_ms=lambda: next(clock), signer=LocalSigner(b"\x01" * 32), chain_id=1337
    )
    await ledger.open()
    yield ledger
    await ledger.shutdown()


def make_books(ledger, desk=None, *, requires_payment=False):
    return SettlementBooks(
        ledger,
        desk,
        base_id="b" * 64,
        price=PRICE,
        policy=SplitPolicy(500_000, 200_000, 300_000),
        payees=Payees(ledger.operator, ledger.operator),
        requires_payment=requires_payment,
    )


def opening(entry=None, voucher=None):
    recipe = () if entry is None else (RecipeEntry(entry, "0.25"),)
    return Opening("req-1", "ann", recipe, ((1, 2, 3),), 8, voucher)


CLOSING = Closing("req-1", "ok", "stop", ((4, 5),), 1)


async def test_served_request_becomes_a_receipt_that_verifies_offline(ledger):
    books = make_books(ledger)
    await books.open(opening())
    bundle = msgspec.json.decode(await books.close(CLOSING))
    verified = receipt.verify(bundle, [ledger.operator])
    assert verified.record.request_id == "req-1"
    assert verified.record.fee_wei == str(3 * 10 + 2 * 100)
    receipt.verify_tokens(bundle, [[1, 2, 3]], [[4, 5]])
    assert await books.receipt("req-1", "ann") == bundle
    assert await books.receipt("req-1", "bob") is None
    assert await books.receipt("req-2", "ann") is None


async def test_adapter_weight_and_identity_are_in_the_record(ledger, bench):
    books = make_books(ledger)
    await books.open(opening(bench.catalog.known["alice"].__class__("x", "1" * 64, manifest_hash=None)))
    record = receipt.verify(msgspec.json.decode(await books.close(CLOSING)), [ledger.operator]).record
    assert [(item.adapter_id, item.weight, item.share_ppm) for item in record.recipe.adapters] == [("1" * 64, "0.25", 1_000_000)]


async def test_voucher_holds_the_most_and_settles_the_fee(ledger):
    desk = FakeDesk()
    books = make_books(ledger, desk)
    await books.open(opening(voucher=VOUCHER))
    assert desk.held == {"req-1": 3 * 10 + 8 * 100}
    await books.close(CLOSING)
    assert (desk.held, desk.fees) == ({}, {"req-1": 230})


async def test_desk_refusal_admits_nothing(ledger):
    desk = FakeDesk()
    desk.fault = PaymentError("the voucher is too small", code="voucher_too_small")
    with pytest.raises(PaymentError):
        await make_books(ledger, desk).open(opening(voucher=VOUCHER))
    assert (await ledger.totals()).records == 0


async def test_payment_required_without_a_voucher_is_refused(ledger):
    with pytest.raises(PaymentError) as caught:
        await make_books(ledger, FakeDesk(), requires_payment=True).open(opening())
    assert caught.value.error_code == "payment_required"


async def test_voucher_without_a_desk_is_refused(ledger):
    with pytest.raises(PaymentError):
        await make_books(ledger).open(opening(voucher=VOUCHER))


async def test_failed_admission_lets_go_of_what_was_held(ledger, monkeypatch):
    desk = FakeDesk()

    async def refuse(admission):
        raise LedgerError("no")

    monkeypatch.setattr(ledger, "admit", refuse)
    with pytest.raises(LedgerError):
        await make_books(ledger, desk).open(opening(voucher=VOUCHER))
    assert (desk.held, desk.released) == ({}, ["req-1"])


class FullEscrow:
    """Every payer has a deposit of 10,000 wei of which nothing was collected."""

    def escrow_committed_wei(self, payer):
        return 10_000

    def collected_wei(self, payer, operator):
        return 0


async def test_signed_voucher_pays_for_a_request_through_the_real_desk(ledger):
    payer, domain = LocalSigner(b"\x02" * 32), escrow_domain(1337, "0x" + "33" * 20)
    promise = Voucher(payer.address, ledger.operator, 900, 4102444800)
    header = {
        "payer": payer.address,
        "operator": ledger.operator,
        "cumulative": str(promise.cumulative),
        "deadline": promise.deadline,
        "signature": "0x" + promise.sign(domain, payer).hex(),
    }
    voucher = read_voucher([base64.urlsafe_b64encode(json.dumps(header).encode()).decode().rstrip("=")])
    desk = VoucherDesk(
        used_wei=ledger.used_wei,
        best_voucher=ledger.best_voucher,
        operator=ledger.operator,
        domain=domain,
        escrow=FullEscrow(),
        now_s=lambda: 1_700_000_000.0,
        monotonic_s=lambda: 1.0,
    )
    books = make_books(ledger, desk, requires_payment=True)
    await books.open(opening(voucher=voucher))
    assert desk.reserved_wei(payer.address) == 830
    verified = receipt.verify(msgspec.json.decode(await books.close(CLOSING)), [ledger.operator])
    assert (verified.record.payer, verified.record.fee_wei) == (payer.address, "230")
    assert (desk.reserved_wei(payer.address), ledger.used_wei(payer.address)) == (0, 230)
    with pytest.raises(PaymentError) as caught:
        await books.open(replace(opening(voucher=voucher), request_id="req-2"))
    assert caught.value.error_code == "voucher_too_small"
