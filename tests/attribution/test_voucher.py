import pytest

from attribution.epoch import EpochStatement, rewards_domain
from attribution.errors import SignatureError
from attribution.signing import LocalSigner, recover
from attribution.voucher import Collection, Voucher, escrow_domain

ESCROW = "0x" + "e5" * 20


@pytest.fixture
def payer(generator):
    return LocalSigner(generator.key("payer"))


@pytest.fixture
def voucher(generator, payer):
    return Voucher(payer.address, LocalSigner(generator.key("operator")).address, 10**18, 2_000_000_000)


def test_voucher_signer_is_the_payer(payer, voucher):
    domain = escrow_domain(31337, ESCROW)

    assert voucher.signer_of(domain, voucher.sign(domain, payer)) == payer.address


@pytest.mark.parametrize(
    "domain", [escrow_domain(31338, ESCROW), escrow_domain(31337, "0x" + "e6" * 20), rewards_domain(31337, ESCROW)]
)
def test_voucher_under_another_domain_names_somebody_else(payer, voucher, domain):
    signature = voucher.sign(escrow_domain(31337, ESCROW), payer)

    assert voucher.signer_of(domain, signature) != payer.address


@pytest.mark.parametrize("field", ["payer", "operator", "cumulative", "deadline"])
def test_voucher_with_a_changed_field_names_somebody_else(payer, voucher, field):
    domain = escrow_domain(31337, ESCROW)
    values = voucher.message()
    values[field] = values[field] + 1 if isinstance(values[field], int) else ESCROW

    assert Voucher(**values).signer_of(domain, voucher.sign(domain, payer)) != payer.address


def test_voucher_beyond_its_types_is_refused(voucher):
    domain = escrow_domain(31337, ESCROW)

    for values in ({"cumulative": 2**256}, {"deadline": 2**64}, {"cumulative": -1}, {"payer": "me"}):
        with pytest.raises(SignatureError):
            Voucher(**{**voucher.message(), **values}).digest(domain)


def test_collection_and_epoch_recover_their_operator(generator, payer):
    operator = LocalSigner(generator.key("operator"))
    collection = Collection(payer.address, operator.address, 5)
    statement = EpochStatement(operator.address, 0, b"\x01" * 32, b"\x02" * 32, b"\x03" * 32, 7)

    for signed, domain in ((collection, escrow_domain(1, ESCROW)), (statement, rewards_domain(1, ESCROW))):
        assert recover(signed.digest(domain), signed.sign(domain, operator)) == operator.address
