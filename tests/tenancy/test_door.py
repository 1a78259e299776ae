"""One answer for every wrong key, and never more than one comparison."""

import hmac

import pytest

from node.errors import AuthError, OverloadedError
from node.tenancy import guesses
from node.tenancy.api_key import Scope
from node.tenancy.door import check_scope
from node.tenancy.tenant import TenantLimits, TenantTerms

TERMS = TenantTerms("acme", 2, TenantLimits(tokens_per_minute=5, max_concurrent=0))


async def make(store, **options):
    return await store.create_key(TERMS, [Scope.INFERENCE], **options)


def bearer(secret):
    return [f"Bearer {secret}"]


def test_node_without_any_key_serves_everybody_but_no_admin(door):
    principal = door.identify([], "10.0.0.1")
    assert (principal.tenant.name, principal.key_id) == ("anonymous", None)
    assert Scope.ADMIN not in principal.scopes
    assert principal.tenant.limits.max_concurrent == 7


async def test_key_names_its_tenant_with_limits_over_the_defaults(store, door):
    key, secret = await make(store)
    principal = door.identify(bearer(secret), "10.0.0.1")
    assert (principal.tenant.name, principal.tenant.weight, principal.key_id) == ("acme", 2, key.key_id)
    assert principal.tenant.limits == TenantLimits(tokens_per_minute=5, max_concurrent=None)


async def test_every_wrong_key_has_one_text_and_one_comparison(store, door, monkeypatch):
    key, secret = await make(store)
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or real(a, b))
    wrong = [
        [],
        bearer(""),
        bearer("x"),
        bearer(secret[:-1]),
        bearer(secret + "x"),
        bearer(secret[:-1] + ("A" if secret[-1] != "A" else "B")),
        bearer(f"olk_{key.key_id}_" + "A" * 43),
        bearer("olk_" + "a" * 12 + "_" + "A" * 43),
        bearer("x" * 100_000),
        bearer("k\u00e9y\udcff"),
        [f"Basic {secret}"],
        [*bearer(secret), *bearer(secret)],
    ]
    texts = set()
    for headers in wrong:
        compared.clear()
        with pytest.raises(AuthError) as caught:
            door.identify(headers, "10.0.0.1")
        assert compared == [(32, 32)]
        texts.add((caught.value.message, caught.value.error_code))
    assert len(texts) == 1


async def test_expired_and_revoked_keys_are_like_wrong_ones(store, door, clock):
    _, short = await make(store, expires_ms=clock.ms() + 1000)
    key, revoked = await make(store)
    door.identify(bearer(short), "")
    door.identify(bearer(revoked), "")
    clock.pass_s(1)
    await store.revoke(key.key_id)
    texts = set()
    for secret in (short, revoked, "wrong"):
        with pytest.raises(AuthError) as caught:
            door.identify(bearer(secret), "")
        texts.add(caught.value.message)
    assert len(texts) == 1


async def test_node_whose_last_key_was_revoked_stays_closed(store, door):
    key, _ = await make(store)
    await store.revoke(key.key_id)
    with pytest.raises(AuthError):
        door.identify([], "")


async def test_guessing_is_429_for_wrong_and_weak_keys_until_the_window_has_passed(store, door, clock):
    _, strong = await make(store)
    await store.import_keys([("filed", "thought-up-by-a-person")])
    for _ in range(guesses.MAX_GUESSES):
        with pytest.raises(AuthError):
            door.identify(bearer("wrong"), "10.0.0.1")
    for secret in ("wrong", "thought-up-by-a-person"):
        with pytest.raises(OverloadedError) as caught:
            door.identify(bearer(secret), "10.0.0.1")
        assert 0 < caught.value.retry_after_s <= 60
    assert door.identify(bearer(strong), "10.0.0.1").tenant.name == "acme"
    assert door.identify(bearer("thought-up-by-a-person"), "10.0.0.2").tenant.name == "filed"
    clock.pass_s(61)
    assert door.identify(bearer("thought-up-by-a-person"), "10.0.0.1").tenant.name == "filed"


def test_table_of_addresses_is_bounded_and_an_ipv6_host_is_one_address(clock):
    table = guesses.Guesses(clock.monotonic)
    for index in range(10_000):
        table.count(f"10.{index >> 16 & 255}.{index >> 8 & 255}.{index & 255}")
    assert len(table._wrong) == guesses.MAX_ADDRESSES
    for index in range(guesses.MAX_GUESSES):
        table.count(f"2001:db8::{index:x}")
    assert table.blocked_s("2001:db8::ffff") > 0
    assert table.blocked_s("2001:db8:0:1::1") == 0
    assert table.blocked_s("not an address") == 0


async def test_scope_that_is_missing_is_named(store, door):
    _, secret = await make(store)
    principal = door.identify(bearer(secret), "")
    check_scope(principal, frozenset({Scope.METRICS, Scope.INFERENCE}))
    with pytest.raises(AuthError, match="metrics") as caught:
        check_scope(principal, frozenset({Scope.METRICS}))
    assert caught.value.error_code == "insufficient_scope"
