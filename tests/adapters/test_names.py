from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.adapters.names import parse_name
from node.errors import AdapterIdError


@pytest.mark.parametrize(
    ("text", "path", "revision", "is_hub_id"),
    [
        ("lincoln", "lincoln", None, False),
        ("owner/name-1.2_x", "owner/name-1.2_x", None, True),
        ("owner/name@main", "owner/name", "main", True),
        ("a@" + "f" * 40, "a", "f" * 40, False),
        ("owner/name@refs/pr/2", "owner/name", "refs/pr/2", True),
        ("x" * 96, "x" * 96, None, False),
    ],
)
def test_parse_good_name_is_taken_apart_and_put_together(text, path, revision, is_hub_id):
    name = parse_name(text)

    assert (name.path, name.revision, name.is_hub_id, str(name)) == (path, revision, is_hub_id, text)


@given(st.text(max_size=40))
def test_parse_any_text_is_refused_or_safe_as_a_relative_path(text):
    try:
        name = parse_name(text)
    except AdapterIdError:
        return

    parts = name.path.split("/")
    assert len(parts) <= 2
    for path in (name.path, name.revision or "main"):
        assert path.isascii()
        assert not path.startswith((".", "/"))
        assert not path.endswith("/")
        assert ".." not in path
        assert "//" not in path
        assert not set(path) & set(",%\\:\0\n ")


def test_parse_any_revision_of_several_parts_is_refused_or_safe():
    for revision in ("/main", "main/", "a//b", "refs/../x", "refs/.git", "a/.", "x" * 97, "a/" * 60 + "b", "a/b.lock"):
        with pytest.raises(AdapterIdError):
            parse_name(f"owner/name@{revision}")
