"""The disk's size limit: who leaves, who stays."""

from __future__ import annotations

import os

import pytest

from node.adapters.disk_cache import DiskCache
from node.errors import AdapterUnavailableError


@pytest.fixture
def fill(tmp_path):
    def make(name, size_bytes, used_s):
        directory = tmp_path / "cache" / "s3" / name / "1"
        directory.mkdir(parents=True)
        (directory / "adapter_model.safetensors").write_bytes(b"x" * size_bytes)
        (directory / ".used").touch()
        os.utime(directory / ".used", (used_s, used_s))
        return directory

    return make


def cache(tmp_path, limit_bytes, now_s=10_000.0):
    return DiskCache(tmp_path / "cache", limit_bytes, lambda: now_s, protected_s=100.0)


def test_make_room_removes_the_least_recently_used_first(tmp_path, fill):
    old, middle, new = fill("a", 10, 3.0), fill("b", 10, 1.0), fill("c", 10, 2.0)

    cache(tmp_path, 30).make_room(15)

    assert [path.exists() for path in (old, middle, new)] == [True, False, False]
    assert not middle.parent.exists()


def test_make_room_that_only_entries_in_use_could_give_is_refused(tmp_path, fill):
    kept = fill("a", 20, 9_950.0)

    with pytest.raises(AdapterUnavailableError) as caught:
        cache(tmp_path, 30).make_room(15)

    assert caught.value.error_code == "cache_full"
    assert kept.exists()


def test_touch_makes_an_entry_the_last_to_leave(tmp_path, fill):
    first, second = fill("a", 10, 1.0), fill("b", 10, 2.0)
    found = cache(tmp_path, 30)
    found.touch(first)

    assert [entry.directory for entry in found.entries()] == [second, first]
    assert found.entries()[1].used_s == 10_000.0


def test_collect_reports_what_left_and_leaves_no_rest(tmp_path, fill):
    fill("a", 10, 1.0)
    fill("b", 10, 2.0)

    removed = cache(tmp_path, 30).collect(10)

    assert [(entry.directory.parent.name, entry.size_bytes) for entry in removed] == [("a", 10)]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["s3"]


def half(tmp_path, size_bytes, written_s):
    directory = tmp_path / "cache" / "s3" / "broken" / ".part-1"
    directory.mkdir(parents=True)
    file = directory / "adapter_model.safetensors"
    file.write_bytes(b"x" * size_bytes)
    for path in (file, directory):
        os.utime(path, (written_s, written_s))
    return directory


def test_download_that_broke_off_takes_room_and_leaves_like_any_other(tmp_path, fill):
    entry, broken = fill("a", 10, 5_000.0), half(tmp_path, 10, 3_000.0)

    assert [item.directory for item in cache(tmp_path, 30).entries()] == [broken, entry]
    cache(tmp_path, 30).make_room(15)

    assert (entry.exists(), broken.exists()) == (True, False)


def test_download_under_way_takes_room_and_stays(tmp_path):
    growing = half(tmp_path, 20, 9_950.0)

    with pytest.raises(AdapterUnavailableError):
        cache(tmp_path, 30).make_room(15)

    assert growing.exists()


def test_entries_of_a_cache_never_used_are_none(tmp_path):
    assert cache(tmp_path, 1).entries() == []
