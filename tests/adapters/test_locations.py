"""What is a location, and what only looks like one."""

from __future__ import annotations

import pytest

from node.adapters.locations import parse_location
from node.errors import AdapterForbiddenError, AdapterIdError


@pytest.mark.parametrize(
    ("text", "source", "expected"),
    [
        ("s3://bucket/a/b", None, ("s3", "s3://bucket/a/b")),
        ("bucket/a", "s3", ("s3", "s3://bucket/a")),
        ("gs://bucket/a/", None, ("gcs", "gs://bucket/a")),
        ("az://container/a", "azure", ("azure", "az://container/a")),
        ("https://host.example:8443/a/b", None, ("http", "https://host.example:8443/a/b")),
    ],
)
def test_parse_location_well_formed_is_read(text, source, expected):
    found = parse_location(text, source)

    assert (found.source, str(found)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "http://[::1]/a", "http://user@host/a", "https://host\\@other/a", "file:///etc/passwd", "ftp://host/a", "gopher://h/a",
        "https://host/../a", "https://host/a/..", "https://host//a", "https://host/a?b=c", "https://host/a#b", "https://host/%2e%2e",
        "https://HOST/a", "https://host:port/a", "https:///a", "s3://bucket", "s3://bucket/", "https://host/.hidden",
        "s3://b/" + "a/" * 17,
    ],
)  # fmt: skip
def test_parse_location_of_another_host_or_path_is_forbidden(text):
    with pytest.raises(AdapterForbiddenError) as caught:
        parse_location(text)

    assert caught.value.error_code == "source_forbidden"
    assert caught.value.message.isascii()


@pytest.mark.parametrize("text", ["", "s3://b/a\n", "s3://b/a b", "s3://b/ä", "s3://b/\u202ea", "s3://b/" + "a" * 2000])
def test_parse_location_with_characters_no_location_has_is_malformed(text):
    with pytest.raises(AdapterIdError):
        parse_location(text)


def test_parse_location_of_another_source_is_forbidden():
    with pytest.raises(AdapterForbiddenError):
        parse_location("gs://bucket/a", "s3")


def test_is_under_ends_at_whole_parts():
    root = parse_location("s3://bucket/team", may_be_root=True)

    assert parse_location("s3://bucket/team/a").is_under(root)
    assert not parse_location("s3://bucket/teammate/a").is_under(root)
    assert not parse_location("s3://other/team/a").is_under(root)
