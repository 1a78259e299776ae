import sqlite3

import pytest

from node.errors import RequestError
from node.tenancy.api_key import Scope, digest_of
from node.tenancy.private_adapters import PrivateAdapter
from node.tenancy.tenant import TenantLimits, TenantTerms

TERMS = TenantTerms("acme", 3, TenantLimits(tokens_per_day=100, wei_per_month=10**30))


async def test_what_was_made_is_there_after_a_restart(open_store):
    async def make(store):
        key, _ = await store.create_key(TERMS, [Scope.INFERENCE, Scope.METRICS], store._clock_ms() + 1000)
        await store.restrict_adapter(PrivateAdapter("secret", "acme", frozenset({"beta"})))
        return key

    made = await open_store(make)

    async def look(store):
        return store.known(made.key_id), store.terms("acme"), store.private_adapter("secret")

    assert await open_store(look) == (made, TERMS, PrivateAdapter("secret", "acme", frozenset({"beta"})))


async def test_no_secret_is_in_the_database(store, tmp_path):
    _, secret = await store.create_key(TERMS, [Scope.INFERENCE])
    await store.import_keys([("filed", "a-key-that-a-person-made")])
    dump = "\n".join(sqlite3.connect(tmp_path / "ledger.sqlite").iterdump())
    raw = b"".join(path.read_bytes() for path in tmp_path.glob("ledger.sqlite*"))
    for text in (secret, secret.split("_", 2)[2], "a-key-that-a-person-made"):
        assert text not in dump
        assert text.encode() not in raw
    assert digest_of(secret).hex().upper() in dump.upper()


async def test_key_in_a_representation_shows_no_digest(store):
    key, secret = await store.create_key(TERMS, [Scope.INFERENCE])
    assert secret not in repr(key)
    assert "digest" not in repr(key)


async def test_revoked_key_stays_revoked_and_closes_the_node(open_store):
    async def make(store):
        key, _ = await store.create_key(TERMS, [Scope.INFERENCE])
        first = await store.revoke(key.key_id)
        assert await store.revoke(key.key_id) == first
        return key.key_id

    key_id = await open_store(make)

    async def look(store):
        return store.known(key_id).revoked_ms is not None, store.has_keys

    assert await open_store(look) == (True, True)


async def test_second_key_of_a_tenant_shares_its_terms(store):
    await store.create_key(TERMS, [Scope.INFERENCE])
    await store.create_key(TenantTerms("acme", 5), [Scope.INFERENCE])
    assert store.terms("acme") == TenantTerms("acme", 5)
    assert len(store.all_keys()) == 2


@pytest.mark.parametrize(
    "terms",
    [
        TenantTerms("anonymous"),
        TenantTerms(""),
        TenantTerms("a b"),
        TenantTerms("x" * 65),
        TenantTerms("\u00e9"),
        TenantTerms("a", 0),
        TenantTerms("a", 1001),
        TenantTerms("a", 1, TenantLimits(tokens_per_day=-1)),
        TenantTerms("a", 1, TenantLimits(max_concurrent=1 << 63)),
    ],
)
async def test_terms_out_of_range_are_refused_and_nothing_is_made(store, terms):
    with pytest.raises(RequestError):
        await store.create_key(terms, [Scope.INFERENCE])
    assert not store.has_keys


async def test_key_without_scope_or_with_a_past_end_is_refused(store, clock):
    with pytest.raises(RequestError):
        await store.create_key(TERMS, [])
    with pytest.raises(RequestError):
        await store.create_key(TERMS, [Scope.INFERENCE], clock.ms())


async def test_unknown_key_and_tenant_are_refused_by_name(store):
    with pytest.raises(RequestError, match="nobody"):
        await store.revoke("nobody")
    with pytest.raises(RequestError, match="acme"):
        await store.set_terms(TERMS)


async def test_key_file_is_the_list_of_its_keys(open_store):
    first, second = ("ann", "key-of-ann-123456"), ("bob", "key-of-bob-123456")

    async def states(store, *pairs):
        await store.import_keys(pairs)
        return {key.tenant: key.revoked_ms is None for key in store.all_keys()}

    assert await open_store(lambda store: states(store, first, second)) == {"ann": True, "bob": True}
    assert await open_store(lambda store: states(store, first)) == {"ann": True}

    async def revoke(store):
        await store.revoke(store.all_keys()[0].key_id)

    await open_store(revoke)
    assert await open_store(lambda store: states(store, first, second)) == {"ann": False, "bob": True}
    assert await open_store(states) == {}


async def test_key_file_leaves_generated_keys_and_terms_alone(store):
    await store.create_key(TERMS, [Scope.INFERENCE])
    await store.import_keys([("acme", "key-of-acme-123456")])
    await store.import_keys([])
    assert [key.is_imported for key in store.all_keys()] == [False]
    assert store.terms("acme") == TERMS


async def test_released_adapter_is_everybodys(store):
    await store.restrict_adapter(PrivateAdapter("secret", "acme"))
    await store.release_adapter("secret")
    await store.release_adapter("secret")
    assert store.private_adapter("secret") is None
