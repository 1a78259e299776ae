import pytest

from attribution.errors import SignatureError
from attribution.registration import Registration, registry_domain
from attribution.signing import LocalSigner

TRAINER = LocalSigner(b"\x05" * 32)
DOMAIN = registry_domain(31337, "0x" + "99" * 20)
REGISTRATION = Registration("a" * 64, "b" * 64, "c" * 64, TRAINER.address, "https://example.org/manifest.json")


def test_registration_signer_is_the_trainer():
    assert REGISTRATION.signer_of(DOMAIN, REGISTRATION.sign(DOMAIN, TRAINER)) == TRAINER.address


@pytest.mark.parametrize(
    "domain", [registry_domain(1, "0x" + "99" * 20), registry_domain(31337, "0x" + "98" * 20)], ids=["chain", "contract"]
)
def test_registration_under_another_domain_names_somebody_else(domain):
    assert REGISTRATION.signer_of(domain, REGISTRATION.sign(DOMAIN, TRAINER)) != TRAINER.address


def test_registration_with_a_malformed_hash_is_refused():
    broken = Registration("a" * 63, "b" * 64, "c" * 64, TRAINER.address, "")
    with pytest.raises(SignatureError, match="adapterId"):
        broken.digest(DOMAIN)
