import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.signing import LocalSigner
from attribution.voucher import Voucher, escrow_domain
from node.errors import LedgerError, PaymentError
from node.settlement.admission import SignedVoucher
from node.settlement.vouchers import VoucherDesk, parse_voucher

PAYER, OPERATOR, OTHER = (LocalSigner(bytes([number]) * 32) for number in (1, 2, 3))
ESCROW = "0x" + "e5" * 20
DOMAIN = escrow_domain(31337, ESCROW)
NOW_S = 1_700_000_000


class FakeEscrow:
    """A deposit that a test sets, and how often it was read."""

    def __init__(self, committed_wei=1000, collected_wei=0):
        self.committed, self.collected, self.reads = committed_wei, collected_wei, 0

    def escrow_committed_wei(self, payer):
        self.reads += 1
        return self.committed

    def collected_wei(self, payer, operator):
        return self.collected


class Desk(VoucherDesk):
    """A desk over a fake escrow, with hands on time and on what the ledger knows."""

    def __init__(self, escrow=None, domain=DOMAIN):
        self.used, self.time_s, self.kept = 0, 0.0, None
        self.escrow = escrow or FakeEscrow()
        super().__init__(
            used_wei=lambda payer: self.used,
            best_voucher=lambda payer: self.kept if payer == PAYER.address else None,
            operator=OPERATOR.address,
            domain=domain,
            escrow=self.escrow,
            now_s=lambda: NOW_S,
            monotonic_s=self.tick,
            cache_s=5.0,
            min_validity_s=60.0,
        )

    def tick(self):
        self.time_s += 0.001
        return self.time_s


def signed(cumulative=1000, deadline=NOW_S + 3600, operator=OPERATOR, signer=PAYER, domain=DOMAIN):
    voucher = Voucher(PAYER.address, operator.address, cumulative, deadline)
    return SignedVoucher(PAYER.address, operator.address, cumulative, deadline, voucher.sign(domain, signer))


async def test_reserve_holds_until_it_is_settled():
    desk = Desk()

    digest = await desk.reserve("r1", signed(), 400)
    assert digest == Voucher(PAYER.address, OPERATOR.address, 1000, NOW_S + 3600).digest(DOMAIN).hex()
    assert desk.reserved_wei(PAYER.address) == 400
    desk.used = 350
    desk.settle("r1", 350)
    assert desk.reserved_wei(PAYER.address) == 0
    await desk.reserve("r2", signed(), 650)
    with pytest.raises(PaymentError, match="350 used, 650 reserved, 1 for this"):
        await desk.reserve("r3", signed(), 1)


async def test_reserve_needs_the_promise_to_cover_used_reserved_and_this_request():
    desk = Desk(FakeEscrow(10**6))
    desk.used = 500
    await desk.reserve("r1", signed(), 300)

    with pytest.raises(PaymentError) as caught:
        await desk.reserve("r2", signed(), 201)
    assert caught.value.error_code == "voucher_too_small"
    await desk.reserve("r2", signed(), 200)
    await desk.reserve("r3", signed(1001), 1)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
async def test_reserve_takes_requests_that_were_signed_together_in_any_order(order):
    desk, promises = Desk(FakeEscrow(900)), (300, 600, 900)
    for index in order:
        await desk.reserve(f"r{index}", signed(promises[index]), 300)
    assert desk.reserved_wei(PAYER.address) == 900
    with pytest.raises(PaymentError, match="promises 900 wei in all"):
        await desk.reserve("r4", signed(600), 1)


async def test_reserve_counts_the_promise_that_the_ledger_keeps_while_it_can_be_collected():
    desk = Desk(FakeEscrow(10**6))
    desk.used, desk.kept = 250, signed(600)
    await desk.reserve("late", signed(300), 300)
    desk.release("late")
    desk.kept = signed(600, deadline=NOW_S + 59)
    with pytest.raises(PaymentError) as caught:
        await desk.reserve("late", signed(300), 300)
    assert caught.value.error_code == "voucher_too_small"


async def test_reserve_forgets_the_promise_of_a_request_that_was_not_admitted():
    desk = Desk(FakeEscrow(10**6))
    await desk.reserve("r2", signed(600), 300)
    desk.release("r2")
    with pytest.raises(PaymentError):
        await desk.reserve("r1", signed(300), 301)


async def test_reserve_needs_the_deposit_to_cover_what_is_not_collected():
    desk = Desk(FakeEscrow(committed_wei=100, collected_wei=500))
    desk.used = 520
    await desk.reserve("r1", signed(10**6), 80)

    with pytest.raises(PaymentError, match="1 wei too small") as caught:
        await desk.reserve("r2", signed(10**6), 1)
    assert caught.value.error_code == "deposit_too_small"
    desk.release("r1")
    await desk.reserve("r2", signed(10**6), 80)


async def test_reserve_reads_the_deposit_again_before_it_refuses():
    desk = Desk(FakeEscrow(10))
    await desk.reserve("r1", signed(), 10)
    desk.escrow.committed = 20

    await desk.reserve("r2", signed(), 10)
    assert desk.escrow.reads == 2


async def test_reserve_believes_a_deposit_for_a_while_only():
    desk = Desk()
    await desk.reserve("r1", signed(), 1)
    await desk.reserve("r2", signed(), 1)
    assert desk.escrow.reads == 1

    desk.time_s += 5
    desk.escrow.committed = 2
    with pytest.raises(PaymentError):
        await desk.reserve("r3", signed(), 1)


async def test_reserve_at_once_never_exceeds_the_promise():
    desk = Desk()

    results = await asyncio.gather(*(desk.reserve(f"r{index}", signed(), 300) for index in range(8)), return_exceptions=True)
    assert sum(isinstance(result, str) for result in results) == 3
    assert desk.reserved_wei(PAYER.address) == 900


@pytest.mark.parametrize(
    ("voucher", "words"),
    [
        (signed(operator=OTHER), "names operator"),
        (signed(deadline=NOW_S + 59), "deadline is 59 s away"),
        (signed(deadline=NOW_S - 1), "at least 60 s"),
        (signed(signer=OTHER), "not signed by its payer"),
        (signed(domain=escrow_domain(1, ESCROW)), "not signed by its payer .* for chain 31337"),
        (signed(domain=escrow_domain(31337, "0x" + "e6" * 20)), "not signed by its payer"),
        (SignedVoucher(PAYER.address, OPERATOR.address, 1000, NOW_S + 3600, bytes(65)), "cannot be checked"),
        (SignedVoucher(PAYER.address, OPERATOR.address, 2000, NOW_S + 3600, signed().signature), "not signed by its payer"),
    ],
)
async def test_reserve_a_voucher_that_is_not_ours_is_invalid(voucher, words):
    desk = Desk()

    with pytest.raises(PaymentError, match=words) as caught:
        await desk.reserve("r1", voucher, 1)
    assert caught.value.error_code == "voucher_invalid"
    assert desk.escrow.reads == 0
    assert desk.reserved_wei(PAYER.address) == 0


async def test_reserve_with_a_ledger_behind_the_chain_is_refused():
    desk = Desk(FakeEscrow(collected_wei=10))

    with pytest.raises(LedgerError, match="restore") as caught:
        await desk.reserve("r1", signed(), 1)
    assert caught.value.error_code == "ledger_corrupt"


async def test_release_of_an_unknown_request_is_nothing():
    desk = Desk()
    desk.release("never")
    await desk.reserve("r1", signed(), 0)
    desk.release("r1")
    desk.release("r1")

    assert desk.reserved_wei(PAYER.address) == 0


async def test_settle_above_the_reservation_is_a_programmer_error():
    desk = Desk()
    await desk.reserve("r1", signed(), 5)

    with pytest.raises(ValueError, match="above its reservation of 5"):
        desk.settle("r1", 6)
    assert desk.reserved_wei(PAYER.address) == 0


async def test_reserve_twice_for_one_request_is_a_programmer_error():
    desk = Desk()
    await desk.reserve("r1", signed(), 5)

    with pytest.raises(ValueError, match="already"):
        await desk.reserve("r1", signed(), 5)


@given(st.lists(st.tuples(st.integers(0, 400), st.booleans(), st.integers(0, 100)), max_size=30))
def test_reserve_in_any_history_stays_covered(steps):
    async def run():
        desk = Desk(FakeEscrow(900))
        for index, (amount, is_settled, part) in enumerate(steps):
            try:
                await desk.reserve(f"r{index}", signed(), amount)
            except PaymentError:
                assert desk.used + desk.reserved_wei(PAYER.address) + amount > 900
                continue
            if is_settled:
                fee = amount * part // 100
                desk.used += fee
                desk.settle(f"r{index}", fee)
            assert desk.used + desk.reserved_wei(PAYER.address) <= 900

    asyncio.run(run())


GOOD = {
    "payer": PAYER.address.lower(),
    "operator": OPERATOR.address,
    "cumulative": "1000",
    "deadline": NOW_S + 3600,
    "signature": "0x" + signed().signature.hex(),
}


def test_parse_voucher_gives_what_was_signed():
    assert parse_voucher(GOOD) == signed()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("payer", "me"),
        ("operator", None),
        ("cumulative", 1000),
        ("cumulative", "-1"),
        ("cumulative", "1e3"),
        ("cumulative", str(2**256)),
        ("cumulative", "9" * 5000),
        ("deadline", "soon"),
        ("deadline", -1),
        ("deadline", 2**64),
        ("deadline", True),
        ("signature", "0x12"),
        ("signature", "zz" * 66),
        ("extra", 1),
    ],
)
def test_parse_voucher_names_the_field_at_fault(field, value):
    with pytest.raises(PaymentError) as caught:
        parse_voucher({**GOOD, field: value})

    assert caught.value.error_code == "voucher_invalid"
    assert field == "extra" or caught.value.param == f"voucher.{field}"


@pytest.mark.parametrize("value", [None, [], "x", {}])
def test_parse_voucher_of_another_shape_is_invalid(value):
    with pytest.raises(PaymentError, match="exactly payer"):
        parse_voucher(value)
