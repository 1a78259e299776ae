"""Adapters that are to come or to go."""

from pathlib import Path

from node.adapters.wishes import WISH_LIMIT, Wishes

PLACE = Path("/x")


def test_wish_to_come_takes_back_the_wish_to_go():
    wishes = Wishes()
    wishes.go("x", is_here=True)
    wishes.come("x", PLACE)
    assert wishes.going == []
    assert wishes.coming == [("x", PLACE)]


def test_wish_to_go_takes_back_the_wish_to_come():
    wishes = Wishes()
    wishes.come("x", PLACE)
    wishes.go("x", is_here=False)
    assert wishes.coming == []
    assert wishes.going == []


def test_oldest_of_too_many_wishes_is_forgotten():
    wishes = Wishes()
    for index in range(WISH_LIMIT + 2):
        wishes.come(str(index), PLACE)
    assert [name for name, _ in wishes.coming] == [str(index) for index in range(2, WISH_LIMIT + 2)]
