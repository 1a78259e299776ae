"""What is left of a download that ends too early."""

from __future__ import annotations

import errno
import os

import pytest

from node.adapters.disk_cache import DiskCache
from node.adapters.remote import RemoteFile
from node.adapters.staging import Staging
from node.errors import AdapterUnavailableError

FILE = RemoteFile("adapter_model.safetensors", 20)


@pytest.fixture
def cache(tmp_path):
    return DiskCache(tmp_path, 30)


def fill(cache, read):
    final = cache.place("s3", "a", "1")
    staging = Staging(cache)
    with staging.filling(final, "a", [FILE]) as part:
        if part is not None:
            staging.receive(part, FILE, read, 100)
    return final


def breaks(file, offset):
    yield b"x" * 12
    raise ConnectionError


def no_room(file, offset):
    yield b"x" * 12
    raise OSError(errno.ENOSPC, "full")


def rest(file, offset):
    yield b"y" * (20 - offset)


def test_broken_download_counts_once_when_it_goes_on(cache):
    with pytest.raises(ConnectionError):
        fill(cache, breaks)

    # 12 of its 20 bytes are here: 8 more fit beside them, 20 more would not.
    assert [entry.size_bytes for entry in cache.entries()] == [12]
    assert (fill(cache, rest) / FILE.name).read_bytes() == b"x" * 12 + b"y" * 8


def test_broken_download_that_goes_on_after_a_day_is_not_collected_by_itself(cache):
    with pytest.raises(ConnectionError):
        fill(cache, breaks)
    for path in (cache.root / "s3/a/.part-1", cache.root / "s3/a/.part-1" / FILE.name):
        os.utime(path, (1.0, 1.0))

    assert (fill(cache, rest) / FILE.name).read_bytes() == b"x" * 12 + b"y" * 8


def test_download_that_fills_the_disk_leaves_it_to_others(cache):
    with pytest.raises(AdapterUnavailableError) as caught:
        fill(cache, no_room)

    assert caught.value.error_code == "cache_full"
    assert not list(cache.root.rglob("*.safetensors"))
