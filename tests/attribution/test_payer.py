"""The paying side: promised totals only grow by what was promised and shrink to what was used."""

from __future__ import annotations

import base64
import json

import pytest

from attribution.payer import Payer
from attribution.signing import LocalSigner
from attribution.voucher import Voucher, escrow_domain

DOMAIN = escrow_domain(31337, "0x" + "11" * 20)
OPERATOR = "0x" + "22" * 20


def _read(header: str) -> dict[str, str]:
    return json.loads(base64.urlsafe_b64decode(header))


def test_header_carries_a_voucher_signed_by_the_payer() -> None:
    payer = Payer(LocalSigner(b"\x01" * 32), OPERATOR, DOMAIN)
    body = _read(payer.header(500, 1_900_000_000))
    voucher = Voucher(body["payer"], body["operator"], int(body["cumulative"]), int(body["deadline"]))
    assert voucher.cumulative == 500
    assert voucher.signer_of(DOMAIN, bytes.fromhex(body["signature"][2:])) == payer.address


def test_header_promises_used_plus_everything_open() -> None:
    payer = Payer(LocalSigner(b"\x01" * 32), OPERATOR, DOMAIN, used_wei=100)
    totals = [int(_read(payer.header(50, 1))["cumulative"]), int(_read(payer.header(70, 1))["cumulative"])]
    assert totals == [150, 220]


def test_charge_frees_what_was_promised_and_not_used() -> None:
    payer = Payer(LocalSigner(b"\x01" * 32), OPERATOR, DOMAIN)
    payer.header(50, 1)
    payer.charge(50, 20)
    assert payer.used_wei == 20
    assert int(_read(payer.header(10, 1))["cumulative"]) == 30


@pytest.mark.parametrize(("promised", "fee"), [(50, 60), (80, 10), (50, -1)])
def test_charge_beyond_the_promise_is_refused(promised: int, fee: int) -> None:
    payer = Payer(LocalSigner(b"\x01" * 32), OPERATOR, DOMAIN)
    payer.header(50, 1)
    with pytest.raises(ValueError, match="hold the one before"):
        payer.charge(promised, fee)
