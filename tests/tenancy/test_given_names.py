"""Names of adapters in a real ledger database."""

from node.adapters.registrations import EVERYBODY, GivenName
from node.tenancy.given_names import GivenNames
from node.tenancy.offline import offline_transact


async def test_names_are_there_after_a_restart_by_owner(url):
    rows = [
        GivenName("", "poet", "lincoln"),
        GivenName(EVERYBODY, "support", "/srv/support"),
        GivenName("acme", "bard", "org/bard", "hub", True),
        GivenName("acme", "lincoln"),
    ]
    async with offline_transact(url) as transact:
        for row in rows:
            await GivenNames(transact).keep(row)

    async with offline_transact(url) as transact:
        assert sorted(await GivenNames(transact).all(), key=repr) == sorted(rows, key=repr)


async def test_name_is_kept_once_and_forgotten_for_its_owner_alone(url):
    async with offline_transact(url) as transact:
        names = GivenNames(transact)
        for owner in ("acme", "beta"):
            await names.keep(GivenName(owner, "poet", "lincoln"))
        await names.keep(GivenName("acme", "poet", "reagan"))
        await names.forget("beta", "poet")
        await names.forget("beta", "poet")

        assert list(await names.all()) == [GivenName("acme", "poet", "reagan")]
