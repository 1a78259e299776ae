"""Names that do not exist for the caller: same answer and same work as a name nobody registered."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import sys

import pytest

from node.adapters.sources.local import LocalSource
from node.adapters.verify import AdapterVerifier
from node.errors import AdapterError, AdapterNotFoundError

FILE_CALLS = ("open", "close", "readlink", "stat", "lstat", "fstat", "listdir", "scandir")


def hides(*names):
    return lambda name: name not in names


@pytest.fixture
def work(monkeypatch):
    """What was done: directories looked for, adapters verified, calls of the file system and how each of them ended."""
    done = []
    for call in FILE_CALLS:
        real = getattr(os, call)

        def count(*arguments, real=real, call=call, **options):
            try:
                result = real(*arguments, **options)
            except OSError as error:
                done.append((call, error.errno))
                raise
            done.append((call, 0))
            return result

        monkeypatch.setattr(os, call, count)
    for kind, name in ((LocalSource, "find"), (AdapterVerifier, "verify")):
        real = getattr(kind, name)

        def spy(self, argument, real=real, name=name):
            done.append(name)
            return real(self, argument)

        monkeypatch.setattr(kind, name, spy)
    return done


@pytest.fixture
def switches_often():
    """Threads take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("is_alias", [False, True])
@pytest.mark.parametrize("source", [None, "local"])
async def test_hidden_name_is_answered_and_worked_for_like_an_unknown_one(catalog, writer, work, tmp_path, is_alias, source):
    writer.write("secret")
    if is_alias:
        await catalog.add(writer.root / "secret", "other")
    name = "other" if is_alias else "secret"
    await catalog.resolve(name)
    answers = []
    for asked in (name, "nobody"):
        work.clear()
        with pytest.raises(AdapterNotFoundError) as caught:
            await catalog.resolve(asked, source, sees=hides(name))
        answers.append((caught.value.message.replace(asked, "NAME"), caught.value.error_code, list(work)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("source", [None, "local"])
@pytest.mark.parametrize("hidden", ["secret", "7", "team/secret"])
@pytest.mark.parametrize("is_path", [False, True])
async def test_file_system_is_asked_the_same_for_a_hidden_name_as_for_an_absent_one(
    make_catalog, writer, work, tmp_path, hidden, source, is_path
):
    writer.write(hidden)
    writer.write("public")
    writer.write("team/public")
    (tmp_path / "further").mkdir()
    catalog = make_catalog(roots=(tmp_path / "further",))
    await catalog.resolve(hidden)
    answers = []
    for path in (hidden, f"{hidden[:-1]}8"):
        asked = f"{writer.root}/{path}" if is_path else path
        work.clear()
        with pytest.raises(AdapterError) as caught:
            await catalog.resolve(asked, source, sees=hides(hidden))
        done = list(work)
        message = caught.value.message.replace(asked[:96], "NAME")
        answers.append((type(caught.value), message, caught.value.error_code, done))
        assert ("open", errno.ENOENT) in done
    assert answers[0] == answers[1]
    work.clear()
    await catalog.resolve("public", sees=hides(hidden))
    assert ("open", 0) in work
    await catalog.close()


async def test_hidden_target_of_a_name_is_worked_for_like_an_absent_one(catalog, writer, work):
    writer.write("secret")
    await catalog.resolve("secret")
    answers = []
    for target in ("secret", "nobody"):
        work.clear()
        with pytest.raises(AdapterNotFoundError) as caught:
            await catalog.register("mine", target, owner="ann", sees=hides("secret"))
        answers.append((caught.value.message.replace(target, "NAME"), list(work)))
    assert answers[0] == answers[1]


async def test_name_is_unloaded_with_the_same_work_whether_or_not_a_hidden_adapter_is_called_so(catalog, writer, work):
    writer.write("secret")
    writer.write("public")
    await catalog.resolve("secret")
    answers = []
    for name in ("secret", "nobody"):
        await catalog.register(name, "public", owner="ann", sees=hides("secret"))
        work.clear()
        entry, was_own = await catalog.unregister(name, owner="ann", sees=hides("secret"))
        answers.append((entry.adapter_id, was_own, list(work)))
    assert answers[0] == answers[1]
    assert ("open", errno.ENOENT) in work


async def test_stranger_does_not_make_the_owners_adapter_unknown(catalog, writer, work):
    writer.write("secret")
    entry = await catalog.resolve("secret")
    with pytest.raises(AdapterNotFoundError):
        await catalog.resolve("secret", sees=hides("secret"))
    work.clear()
    assert await catalog.resolve("secret") is entry
    assert "verify" not in work


async def test_hidden_content_is_asked_for_as_often_as_content_that_nobody_has(catalog, writer, work):
    writer.write("secret")
    entry = await catalog.resolve("secret")
    answers = []
    for asked in (entry.adapter_id, "0" * 64):
        names = []
        work.clear()
        with pytest.raises(AdapterNotFoundError):
            await catalog.resolve(asked, sees=lambda name, names=names: names.append(name) or name != "secret")
        answers.append((len(names), list(work)))
    assert answers[0] == answers[1]


async def test_hidden_content_is_not_found_and_the_owner_still_has_it(catalog, writer):
    writer.write("secret")
    entry = await catalog.resolve("secret")
    with pytest.raises(AdapterNotFoundError):
        await catalog.resolve(entry.adapter_id, sees=hides("secret"))
    with pytest.raises(AdapterNotFoundError):
        await catalog.resolve("secret", sees=hides("secret"))
    assert (await catalog.resolve(entry.adapter_id)).adapter_id == entry.adapter_id
    assert [item.name for item in catalog.entries()] == ["secret"]
    assert catalog.entries(hides("secret")) == ()


async def test_content_that_is_public_under_another_name_is_found_through_that_name(catalog, writer):
    writer.write("a-secret")
    writer.write("public")
    entry = await catalog.resolve("a-secret")
    await catalog.resolve("public")
    assert (await catalog.resolve(entry.adapter_id, sees=hides("a-secret"))).name == "public"


async def test_broken_private_adapter_tells_its_trouble_to_its_owner_alone(catalog, writer):
    writer.write("secret", r=0)
    with pytest.raises(Exception, match="rank"):
        await catalog.resolve("secret")
    with pytest.raises(AdapterNotFoundError) as caught:
        await catalog.resolve("secret", sees=hides("secret"))
    assert "rank" not in caught.value.message


async def test_verification_under_way_is_not_joined_by_a_stranger(catalog, writer, work):
    writer.write("secret")
    owner = asyncio.create_task(catalog.resolve("secret"))
    await asyncio.sleep(0)
    with pytest.raises(AdapterNotFoundError):
        await catalog.resolve("secret", sees=hides("secret"))
    assert not owner.done()
    assert (await owner).name == "secret"


async def test_entries_can_be_listed_on_a_thread_while_adapters_change(catalog, writer, switches_often):
    """Metrics are rendered on a thread of their own."""
    directory = writer.write("a")
    names = [f"name-{index}" for index in range(400)]
    for name in names:
        await catalog.add(directory, name)

    def list_often():
        for _ in range(300):
            catalog.entries()

    listing = asyncio.create_task(asyncio.to_thread(list_often))
    for turn in itertools.count(1):
        os.utime(directory / "adapter_config.json", (turn, turn))  # every name is checked and kept anew
        for name in names[:20]:
            await catalog.resolve(name)
        if listing.done():
            break
    await listing
