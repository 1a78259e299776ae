from hypothesis import given
from hypothesis import strategies as st

from node.engine.places import Places


def test_flood_of_one_tenant_leaves_places_for_another():
    places = Places(64)
    entered = 0
    while places.has_room("flood"):
        places.enter("flood")
        entered += 1
    assert entered == 56
    quiet = 0
    while places.has_room("quiet"):
        places.enter("quiet")
        quiet += 1
    assert quiet == 8
    for _ in range(20):
        places.leave("flood")
        assert not places.has_room("flood") or places.count < 56
        if places.has_room("quiet"):
            places.enter("quiet")
            quiet += 1
    assert quiet == 64 // 3 + 1


def test_few_places_have_no_reserve():
    places = Places(2)
    places.enter("a")
    assert places.has_room("a")
    places.enter("a")
    assert not places.has_room("b")


@given(st.integers(1, 40), st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=200))
def test_count_is_never_above_the_limit_and_a_newcomer_is_never_refused_for_one_tenant(limit, steps):
    places, held = Places(limit), {}
    for tenant, enters in steps:
        if enters and places.has_room(tenant):
            places.enter(tenant)
            held[tenant] = held.get(tenant, 0) + 1
        elif not enters and held.get(tenant):
            places.leave(tenant)
            held[tenant] -= 1
        assert places.count == sum(held.values()) <= limit
        if limit >= 8 and len([count for count in held.values() if count]) == 1:
            assert places.has_room("newcomer")
