"""Stores that some tenants alone may use."""

import pytest

from node.config import StoreSettings
from node.errors import ConfigError
from node.tenancy.private_adapters import StoreRules
from node.tenancy.tenancy import Tenancy

RULES = StoreRules(
    [
        StoreSettings(url="s3://bucket/all"),
        StoreSettings(url="s3://bucket/acme", tenants=("acme", "beta")),
        StoreSettings(url="s3://bucket/acme/inner", tenants=("acme",)),
        StoreSettings(url="https://models.example/beta", tenants=("beta",)),
    ]
)


@pytest.mark.parametrize(
    ("name", "tenants"),
    [
        ("s3://bucket/all/x", "acme beta gamma everybody"),
        ("s3://bucket/acme/x", "acme beta"),
        ("s3://bucket/acme", "acme beta"),
        ("s3://bucket/acme2/x", "acme beta gamma everybody"),
        ("s3://bucket/acme/inner/x", "acme"),
        ("https://models.example/beta/x", "beta"),
        ("lincoln", "acme beta gamma everybody"),
        ("acme/x", "acme beta gamma everybody"),
    ],
)
def test_adapter_of_a_store_exists_for_those_the_store_names(name, tenants):
    assert (
        " ".join(tenant for tenant in ("acme", "beta", "gamma") if RULES.admits(name, tenant))
        + (" everybody" if RULES.admits(name, None) else "")
        == tenants
    )


async def test_tenancy_hides_a_stores_adapters_from_others_and_from_metrics(store):
    tenancy = Tenancy(store, None, None, RULES)
    name = "s3://bucket/acme/x"

    assert (tenancy.sees("acme")(name), tenancy.sees("gamma")(name), tenancy.is_public(name)) == (True, False, False)
    assert tenancy.is_public("lincoln")


def test_store_that_names_what_no_tenant_can_be_called_is_a_setting_error():
    with pytest.raises(ConfigError, match=r"adapters\.stores"):
        StoreRules([StoreSettings(url="s3://bucket", tenants=("a b",))])
