from __future__ import annotations

import asyncio
import shutil
import threading

import pytest

from node.adapters.verify import AdapterVerifier
from node.errors import (
    AdapterChangedError,
    AdapterForbiddenError,
    AdapterIdError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    ConfigError,
    RequestError,
)


class Gate:
    """Holds verifications back until it is opened, and counts them."""

    def __init__(self, monkeypatch):
        self.open = threading.Event()
        self.count = 0
        real = AdapterVerifier.verify

        def verify(verifier, directory):
            self.count += 1
            assert self.open.wait(20)
            return real(verifier, directory)

        monkeypatch.setattr(AdapterVerifier, "verify", verify)


async def test_start_lists_the_directory_and_names_what_it_cannot_serve(catalog, writer):
    writer.write("b")
    writer.write("a")
    writer.write("broken", r=0)
    (writer.root / "no-adapter").mkdir()

    await catalog.start()

    assert [entry.name for entry in catalog.entries()] == ["a", "b"]
    assert {name: error.error_code for name, error in catalog.problems.items()} == {"broken": "adapter_rank_unsupported"}


async def test_start_with_directory_that_does_not_exist_is_a_setting_error(make_catalog, tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        make_catalog(roots=(tmp_path / "nowhere",))


async def test_resolve_directory_changed_on_disk_gets_its_new_id(catalog, writer):
    writer.write("a", writer.tensors(seed=1))
    before = await catalog.resolve("a")
    writer.write("a", writer.tensors(seed=2))

    after = await catalog.resolve("a")

    assert after.adapter_id != before.adapter_id
    assert [entry.adapter_id for entry in catalog.entries()] == [after.adapter_id]


async def test_resolve_pinned_to_other_content_is_changed_error(catalog, writer):
    writer.write("a", writer.tensors(seed=1))
    pinned = (await catalog.resolve("a")).adapter_id
    assert (await catalog.resolve("a", pin=pinned)).adapter_id == pinned
    writer.write("a", writer.tensors(seed=2))

    with pytest.raises(AdapterChangedError) as caught:
        await catalog.resolve("a", pin=pinned)

    assert caught.value.error_code == "adapter_digest_mismatch"


async def test_resolve_by_content_hash_finds_what_is_known_and_nothing_that_moved(catalog, writer):
    writer.write("a", writer.tensors(seed=1))
    adapter_id = (await catalog.resolve("a")).adapter_id
    assert (await catalog.resolve(adapter_id)).name == "a"
    writer.write("a", writer.tensors(seed=2))

    with pytest.raises(AdapterChangedError):
        await catalog.resolve(adapter_id)
    with pytest.raises(AdapterNotFoundError):
        await catalog.resolve(adapter_id)


async def test_resolve_removed_directory_leaves_the_list(catalog, writer):
    directory = writer.write("a")
    await catalog.resolve("a")
    shutil.rmtree(directory)

    with pytest.raises(AdapterNotFoundError):
        await catalog.resolve("a")

    assert catalog.entries() == ()


async def test_resolve_link_within_the_root_is_served(catalog, writer):
    writer.write("owner/real")
    (writer.root / "alias").symlink_to(writer.root / "owner" / "real")

    assert (await catalog.resolve("alias")).adapter_id == (await catalog.resolve("owner/real")).adapter_id


async def test_resolve_asked_by_many_verifies_once(catalog, writer, monkeypatch):
    gate = Gate(monkeypatch)
    writer.write("a")
    waiting = [asyncio.create_task(catalog.resolve("a")) for _ in range(20)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    gate.open.set()

    found = await asyncio.gather(*waiting[1:])

    assert gate.count == 1
    assert len({entry.adapter_id for entry in found}) == 1


async def test_resolve_cold_storm_is_refused_and_known_adapters_go_on(catalog, writer, monkeypatch):
    writer.write("hot")
    await catalog.resolve("hot")
    for number in range(100):
        (writer.root / f"cold-{number}").mkdir()
    gate = Gate(monkeypatch)
    storm = [asyncio.create_task(catalog.resolve(f"cold-{number}")) for number in range(100)]
    await asyncio.sleep(0)

    assert (await catalog.resolve("hot")).name == "hot"
    gate.open.set()
    errors = await asyncio.gather(*storm, return_exceptions=True)

    codes = [error.error_code for error in errors]
    assert codes.count("adapter_queue_full") == 36
    assert codes.count("adapter_format_unsupported") == 64
    assert all(error.is_retryable for error in errors if isinstance(error, AdapterUnavailableError))


async def test_resolve_slow_check_times_out_and_serves_the_next_caller(make_catalog, writer, monkeypatch):
    gate = Gate(monkeypatch)
    catalog = make_catalog(fetch_timeout_s=0.01)
    writer.write("a")

    with pytest.raises(AdapterUnavailableError) as caught:
        await catalog.resolve("a")
    gate.open.set()
    while not catalog.entries():
        await asyncio.sleep(0)

    assert caught.value.error_code == "source_limit"
    assert (await catalog.resolve("a")).name == "a"
    assert gate.count == 1
    await catalog.close()


async def test_resolve_bad_adapter_again_costs_nothing_until_it_changes_or_time_passes(catalog, writer, clock, monkeypatch):
    gate = Gate(monkeypatch)
    gate.open.set()
    writer.write("a", r=0)
    for _ in range(3):
        with pytest.raises(AdapterInvalidError):
            await catalog.resolve("a")
    assert gate.count == 1

    clock.now_s += 61
    with pytest.raises(AdapterInvalidError):
        await catalog.resolve("a")
    assert gate.count == 2

    writer.write("a")
    assert (await catalog.resolve("a")).name == "a"


async def test_add_path_is_served_under_its_name_and_a_bad_one_is_not(catalog, writer, tmp_path):
    outside = type(writer)(tmp_path / "outside")

    entry = await catalog.add(outside.write("mine"))
    with pytest.raises(AdapterInvalidError):
        await catalog.add(outside.write("bad", r=0))

    assert (await catalog.resolve("mine", "local")).adapter_id == entry.adapter_id
    with pytest.raises(AdapterNotFoundError):
        await catalog.resolve("bad")


@pytest.mark.parametrize("source", ["s3", "pbase", "http://169.254.169.254/", ""])
async def test_resolve_other_source_is_forbidden(catalog, source):
    with pytest.raises(AdapterForbiddenError) as caught:
        await catalog.resolve("a", source)

    assert caught.value.error_code == "source_forbidden"


async def test_resolve_hub_name_where_the_hub_is_off_is_forbidden(catalog):
    with pytest.raises(AdapterForbiddenError, match="allow_hub"):
        await catalog.resolve("owner/name")


# ---- names given and taken back


async def test_register_gives_an_adapter_a_second_name_for_its_owner_only(catalog, writer):
    writer.write("good")

    entry, before = await catalog.register("alias", "good", owner="a")

    assert (entry.name, before) == ("alias", None)
    assert (await catalog.resolve("alias", owner="a")).adapter_id == entry.adapter_id
    assert [item.name for item in catalog.entries(owner="a")] == ["alias", "good"]
    assert [item.name for item in catalog.entries(owner="b")] == ["good"]
    with pytest.raises(AdapterNotFoundError):
        await catalog.resolve("alias", owner="b")


async def test_register_a_name_twice_is_refused_unless_it_replaces(catalog, writer):
    writer.write("good")
    writer.write("other", writer.tensors(seed=1))
    first, _ = await catalog.register("alias", "good", owner="a")

    with pytest.raises(RequestError) as caught:
        await catalog.register("alias", "other", owner="a")
    second, before = await catalog.register("alias", "other", owner="a", replaces=True)

    assert caught.value.error_code == "adapter_exists"
    assert before.adapter_id == first.adapter_id != second.adapter_id
    assert (await catalog.resolve("alias", owner="a")).adapter_id == second.adapter_id


async def test_register_what_cannot_be_used_changes_nothing(catalog):
    with pytest.raises(AdapterNotFoundError):
        await catalog.register("alias", "absent", owner="a")

    assert catalog.entries(owner="a") == ()


async def test_unregister_takes_a_name_back_from_its_owner_until_it_is_given_again(catalog, writer):
    writer.write("good")
    await catalog.resolve("good")

    entry, was_own = await catalog.unregister("good", owner="a")

    assert (entry.name, was_own) == ("good", False)
    assert catalog.entries(owner="a") == ()
    with pytest.raises(AdapterNotFoundError, match="unloaded"):
        await catalog.resolve("good", owner="a")
    assert (await catalog.resolve("good", owner="b")).name == "good"
    await catalog.register("good", "good", owner="a")
    assert (await catalog.resolve("good", owner="a")).name == "good"


async def test_unregister_a_name_of_somebody_else_finds_nothing(catalog, writer):
    writer.write("good")
    await catalog.register("alias", "good", owner="a")

    with pytest.raises(AdapterNotFoundError):
        await catalog.unregister("alias", owner="b")
    assert (await catalog.unregister("alias", owner="a"))[1] is True


async def test_resolve_by_content_hash_follows_the_files(catalog, writer):
    writer.write("good")
    before = await catalog.resolve("good")
    writer.write("good", writer.tensors(seed=3))
    after = await catalog.resolve("good")

    with pytest.raises(AdapterNotFoundError):
        await catalog.resolve(before.adapter_id)
    assert (await catalog.resolve(after.adapter_id)).name == "good"


async def test_start_lists_ludwigs_output_beside_plain_adapters(catalog, writer):
    plain = writer.write("plain")
    (writer.root / "ludwig").mkdir()
    shutil.copytree(plain, writer.root / "ludwig" / "model_weights")

    await catalog.start()

    assert [entry.name for entry in catalog.entries()] == ["ludwig", "plain"]
    assert (await catalog.resolve("ludwig")).adapter_id == (await catalog.resolve("plain")).adapter_id


async def test_resolve_ludwig_directory_changed_inside_is_verified_again(catalog, writer):
    (writer.root / "ludwig").mkdir()
    for seed in (1, 2):
        made = writer.write("made", writer.tensors(seed=seed))
        shutil.copytree(made, writer.root / "ludwig" / "model_weights", dirs_exist_ok=True)
        found = await catalog.resolve("ludwig")

        assert found.adapter_id == (await catalog.resolve("made")).adapter_id


async def test_resolve_absolute_path_below_a_root_is_the_adapter_of_that_name(catalog, writer):
    writer.write("good")
    writer.write("team/other")
    for name in ("good", "team/other"):
        for source in (None, "local"):
            entry = await catalog.resolve(f"{writer.root / name}/", source)
            assert (entry.name, entry.source) == (name, "local")


async def test_resolve_absolute_path_elsewhere_is_refused_the_same_whatever_is_there(catalog, writer, tmp_path):
    writer.write("good")
    type(writer)(tmp_path / "far").write("x")
    (writer.root / "way-out").symlink_to(tmp_path / "far" / "x")
    root, texts = writer.root, set()
    for path in (
        tmp_path / "far" / "x",
        root / "absent",
        root / "way-out",
        root,
        f"{root}/../far/x",
        f"{root}-x/good",
        "/etc",
        "/",
    ):
        with pytest.raises(AdapterIdError) as caught:
            await catalog.resolve(str(path), "local")
        texts.add(caught.value.message.replace(ascii(str(path)[:96]), "PATH"))
    assert len(texts) == 1


async def test_resolve_absolute_path_that_an_earlier_root_hides_is_refused(make_catalog, writer, tmp_path):
    writer.write("good")
    second = type(writer)(tmp_path / "second")
    second.write("good", second.tensors(seed=1))
    second.write("only")
    catalog = make_catalog(roots=(second.root,))
    with pytest.raises(AdapterIdError):
        await catalog.resolve(str(second.root / "good"))
    assert (await catalog.resolve(str(second.root / "only"))).name == "only"
    await catalog.close()


async def test_is_known_what_lies_in_a_directory_was_added_or_fetched(catalog, writer, tmp_path):
    writer.write("good")
    await catalog.add(type(writer)(tmp_path / "far").write("x"), "support")
    assert [catalog.is_known(name) for name in ("good", "support", "nobody", "owner/name", "s3://bucket/x")] == [
        True,
        True,
        False,
        False,
        False,
    ]
