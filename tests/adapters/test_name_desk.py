"""Names that outlive the node: durable before they are seen, found again after a restart, never with a token."""

from __future__ import annotations

import asyncio
from itertools import product

import pytest

import node.adapters.name_desk as name_desk
import node.adapters.registrations as registrations
from node.adapters.entry import sees_all
from node.adapters.registrations import EVERYBODY, GivenName
from node.errors import (
    AdapterForbiddenError,
    AdapterIdError,
    AdapterNotFoundError,
    LedgerError,
    OverloadedError,
    RequestError,
)
from tests.adapters.test_hub import TOKEN, hub, published  # noqa: F401  (fixtures)


class Kept:
    """A store in memory that outlives catalogs."""

    def __init__(self):
        self.rows = {}
        self.is_broken = False

    async def all(self):
        return [self.rows[key] for key in sorted(self.rows)]

    async def keep(self, given):
        await asyncio.sleep(0)
        if self.is_broken:
            raise LedgerError("the disk is full")
        self.rows[given.owner, given.name] = given

    async def forget(self, owner, name):
        await asyncio.sleep(0)
        if self.is_broken:
            raise LedgerError("the disk is full")
        self.rows.pop((owner, name), None)


@pytest.fixture
def kept():
    return Kept()


@pytest.fixture
async def start(make_catalog, kept):
    """A catalog as a start of the node makes it, over what the last one left."""
    made = []

    async def run(sees_of=lambda owner: sees_all, **options):
        if made:
            await made[-1].close()
        made.append(make_catalog(names=kept, **options))
        await made[-1].start()
        await made[-1].restore(sees_of)
        return made[-1]

    yield run
    await made[-1].close()


async def names_of(catalog, owner, expected):
    """The owner's list, once what is found in the background was found."""
    async with asyncio.timeout(20):
        while (seen := [entry.name for entry in catalog.entries(owner=owner)]) != expected:
            await asyncio.sleep(0.01)
    return seen


async def test_given_and_taken_names_are_the_same_after_a_restart(start, writer):
    writer.write("good")
    writer.write("other", writer.tensors(seed=1))
    before = await start()
    await before.register("poet", "good", owner="a")
    await before.register("gone", "good", owner="a")
    await before.unregister("gone", owner="a")
    await before.unregister("other", owner="a")

    after = await start()

    assert await names_of(after, "a", ["good", "poet"])
    assert (await after.resolve("poet", owner="a")).adapter_id == (await after.resolve("good")).adapter_id
    for name in ("gone", "other"):
        with pytest.raises(AdapterNotFoundError):
            await after.resolve(name, owner="a")
    assert [entry.name for entry in after.entries(owner="b")] == ["good", "other"]
    with pytest.raises(AdapterNotFoundError):
        await after.resolve("poet", owner="b")
    with pytest.raises(RequestError) as caught:
        await after.register("poet", "good", owner="a")
    assert caught.value.error_code == "adapter_exists"


async def test_name_whose_adapter_is_gone_says_so_and_can_be_unloaded(start, writer):
    directory = writer.write("good")
    await (await start()).register("poet", "good", owner="a")
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()

    after = await start()

    with pytest.raises(AdapterNotFoundError):
        await after.resolve("poet", owner="a")
    assert await after.unregister("poet", owner="a") == (None, True)


async def test_restored_name_of_an_adapter_closed_meanwhile_is_closed(start, writer):
    writer.write("good")
    await (await start()).register("poet", "good", owner="a")

    after = await start(lambda owner: lambda name: name != "good")

    with pytest.raises(AdapterNotFoundError):
        await after.resolve("poet", owner="a", sees=lambda name: name != "good")
    assert after.entries(lambda name: name != "good", "a") == ()


async def test_token_is_kept_nowhere_and_asked_for_after_a_restart(start, kept, hub, published):  # noqa: F811
    hub.publish("owner/name", published, token=TOKEN)
    before = await start(endpoint=hub.url, allow_hub=True)
    await before.register("mine", "owner/name", "hub", TOKEN, owner="a")
    assert TOKEN not in repr(kept.rows)

    after = await start(endpoint=hub.url, allow_hub=True)
    asked = len(hub.requests)
    with pytest.raises(AdapterForbiddenError, match="restart") as caught:
        await after.resolve("mine", owner="a")

    assert (caught.value.error_code, caught.value.param, len(hub.requests)) == ("adapter_gated", "api_token", asked)
    assert (await after.resolve("mine", owner="a", token=TOKEN)).name == "mine"
    with pytest.raises(AdapterForbiddenError):
        await after.resolve("mine", owner="a", token="hf_other")


async def test_name_that_is_not_durable_does_not_exist(start, kept, writer):
    writer.write("good")
    catalog = await start()
    await catalog.register("poet", "good", owner="a")
    kept.is_broken = True

    with pytest.raises(LedgerError):
        await catalog.register("bard", "good", owner="a")
    with pytest.raises(LedgerError):
        await catalog.unregister("poet", owner="a")
    with pytest.raises(LedgerError):
        await catalog.unregister("good", owner="a")

    assert [entry.name for entry in catalog.entries(owner="a")] == ["good", "poet"]


async def code_or_id(catalog, name, owner):
    try:
        return (await catalog.resolve(name, owner=owner)).adapter_id
    except AdapterNotFoundError as error:
        return error.error_code


STEPS = [("load", "good"), ("load", "other"), ("in place", "good"), ("in place", "other"), ("unload", None)]


async def test_name_of_a_directory_follows_every_order_of_loads_and_unloads(start, writer):
    writer.write("good")
    writer.write("other", writer.tensors(seed=1))
    catalog = await start()
    ids = {name: (await catalog.resolve(name)).adapter_id for name in ("good", "other")}
    expected = {}
    for order in product(STEPS, repeat=4):
        owner, is_own, stands = repr(order), False, ids["good"]
        for step, target in order:
            try:
                if step == "unload":
                    await catalog.unregister("good", owner=owner)
                else:
                    await catalog.register("good", target, owner=owner, replaces=step == "in place")
            except AdapterNotFoundError:
                assert (step, stands) == ("unload", "adapter_unloaded")
            except RequestError:
                assert (step, is_own) == ("load", True)
            else:
                is_own, stands = step != "unload", ids.get(target, "adapter_unloaded")
            assert await code_or_id(catalog, "good", owner) == stands, order
            assert ("good" in [entry.name for entry in catalog.entries(owner=owner)]) == (stands in ids.values())
        expected[owner] = stands

    after = await start()

    assert {owner: await code_or_id(after, "good", owner) for owner in expected} == expected
    assert await code_or_id(after, "good", "another") == ids["good"]


async def test_unloaded_name_that_a_source_or_an_unused_directory_has_is_closed(start, writer):
    writer.write("good")
    catalog = await start()
    await catalog.register("late", "good", owner="a")
    await catalog.register("org/never-asked", "good", owner="a")
    writer.write("late", writer.tensors(seed=1))

    for name in ("late", "org/never-asked"):
        await catalog.unregister(name, owner="a")
        assert await code_or_id(catalog, name, "a") == "adapter_unloaded"


async def test_unloaded_name_tells_nothing_of_a_closed_directory_and_keeps_no_row(start, kept, writer):
    writer.write("good")
    writer.write("closed", writer.tensors(seed=1))
    catalog = await start()
    for name in ("closed", "nobodys"):
        await catalog.register(name, "good", owner="a")
        await catalog.unregister(name, owner="a", sees=lambda name: name != "closed")

    assert kept.rows == {}


@pytest.mark.parametrize(("owner", "is_shared"), [("", False), ("a", True)])
async def test_what_a_directorys_name_stood_for_is_let_go_unless_others_use_it(start, writer, owner, is_shared):
    writer.write("good")
    writer.write("other", writer.tensors(seed=1))
    catalog = await start()
    good = await catalog.resolve("good")

    _, first = await catalog.register("good", "other", owner=owner, replaces=True)
    _, second = await catalog.register("good", "good", owner=owner, replaces=True)
    left, was_own = await catalog.unregister("good", owner=owner)
    _, third = await catalog.register("good", "other", owner=owner)

    assert first == (None if is_shared else good)
    assert (second.name, second.adapter_id == good.adapter_id) == ("good", False)
    assert (left, was_own) == (good, not is_shared)
    assert third is None


async def test_one_of_two_who_give_the_same_name_at_once_is_refused(start, kept, writer):
    writer.write("good")
    writer.write("other", writer.tensors(seed=1))
    catalog = await start()

    both = (catalog.register("poet", target, owner="a") for target in ("good", "other"))
    answers = await asyncio.gather(*both, return_exceptions=True)

    [refused] = [answer for answer in answers if isinstance(answer, RequestError)]
    [(entry, _)] = [answer for answer in answers if isinstance(answer, tuple)]
    assert refused.error_code == "adapter_exists"
    assert (await catalog.resolve("poet", owner="a")).adapter_id == entry.adapter_id
    assert kept.rows["a", "poet"].target == ("good" if answers[0] is not refused else "other")


async def test_name_unloaded_while_it_is_resolved_stays_unloaded(start, writer):
    writer.write("good")
    catalog = await start()
    await catalog.register("poet", "good", owner="a")
    writer.write("good", writer.tensors(seed=2))  # to be verified again

    resolving = asyncio.create_task(catalog.resolve("poet", owner="a"))
    await asyncio.sleep(0)
    await catalog.unregister("poet", owner="a")

    assert (await resolving).name == "poet"
    assert [entry.name for entry in catalog.entries(owner="a")] == ["good"]


async def test_owner_with_too_many_names_is_refused_and_others_go_on(start, writer, monkeypatch):
    monkeypatch.setattr(registrations, "MAX_OF_AN_OWNER", 2)
    writer.write("good")
    catalog = await start()
    await catalog.register("first", "good", owner="a")
    await catalog.unregister("good", owner="a")

    with pytest.raises(OverloadedError, match="2 names"):
        await catalog.register("third", "good", owner="a")
    await catalog.register("first", "good", owner="a", replaces=True)
    await catalog.register("third", "good", owner="b")
    await catalog.register("good", "good", owner="a")
    await catalog.unregister("good", owner="a")
    await catalog.unregister("first", owner="a")
    await catalog.register("third", "good", owner="a")


@pytest.mark.parametrize(
    ("name", "target", "param"),
    [
        ("a,b", "good", "lora_name"),
        ("poet@v1", "good", "lora_name"),
        ("poet", "a/b/c", "lora_path"),
        ("poet", "/etc", "lora_path"),
    ],
)
async def test_register_names_the_field_that_is_wrong(start, writer, name, target, param):
    writer.write("good")
    catalog = await start()
    with pytest.raises(AdapterIdError) as caught:
        await catalog.register(name, target, owner="a")
    assert caught.value.param == param
    with pytest.raises(AdapterIdError) as caught:
        await catalog.unregister("a,b", owner="a")
    assert caught.value.param == "lora_name"


async def test_added_directory_is_served_after_a_restart_until_it_is_removed(start, kept, writer, tmp_path):
    far = type(writer)(tmp_path / "far").write("x")
    before = await start()
    entry = await before.add(far, "support")
    assert kept.rows == {(EVERYBODY, "support"): GivenName(EVERYBODY, "support", str(far))}

    middle = await start()
    assert (await middle.resolve("support")).adapter_id == entry.adapter_id
    assert [item.name for item in middle.entries(owner="b")] == ["support"]
    await middle.remove("support")
    with pytest.raises(AdapterNotFoundError):
        await middle.resolve("support")
    with pytest.raises(AdapterNotFoundError, match="was added"):
        await middle.remove("support")

    assert (await start()).entries() == ()


async def test_added_directory_that_cannot_be_served_any_more_is_a_problem(start, writer, tmp_path):
    far = type(writer)(tmp_path / "far").write("x")
    await (await start()).add(far, "support")
    (far / "adapter_config.json").write_text("{}")

    after = await start()

    assert list(after.problems) == ["support"]
    type(writer)(tmp_path / "far").write("x")
    assert (await after.resolve("support")).name == "support"
    assert not after.problems
    await after.remove("support")


async def test_restart_asks_sources_about_a_bounded_number_of_names(start, writer, monkeypatch):
    monkeypatch.setattr(name_desk, "RESTORED_NAMES", 1)
    writer.write("good")
    before = await start()
    for name in ("first", "second"):
        await before.register(name, "good", owner="a")

    after = await start()

    assert await names_of(after, "a", ["first", "good"])
    assert (await after.resolve("second", owner="a")).name == "second"
    assert await names_of(after, "a", ["first", "good", "second"])
