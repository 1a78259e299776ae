"""Corpus A, 21 and 22: names that are paths, lists or worse. Nothing is opened, nothing is asked for.

Different from the corpus for a reason: a model field with control characters or 5 kB is refused as a malformed field
(invalid_request) before it is anybody's name; an empty `model` asks for the base, as LoRAX has it; a name that no
source can have is 404 on a node with sources.
"""

from __future__ import annotations

import os
import socket

import pytest

pytestmark = pytest.mark.e2e

MALFORMED = {
    "21 parent": "../good",
    "21 parent inside": "a/../good",
    "21 absolute": "/etc",
    "21 root": "/",
    "21 current": "./good",
    "22 comma": "good,other",
    "22 percent": "%2e%2e",
    "22 percent slash": "a%2fb",
    "22 three parts": "a/b/c",
    "22 no revision": "good@",
    "22 revision alone": "@main",
    "22 two revisions": "a@b@c",
    "22 290 characters": "x" * 290,
    "22 backslash": "a\\b",
    "22 space": "a b",
    "22 letter outside ASCII": "\u00e4",
    "22 hidden": ".hidden",
    "22 dots": "a..b",
}
NO_LABEL = {"22 5 kB": "x" * 5000, "22 newline": "a\nb", "22 nul": "a\x00b", "22 right to left": "abc\u202egnp"}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_name_is_400(stage, name):
    asked = len(stage.hub.requests)
    answer = stage.refused(lambda: stage.complete(MALFORMED[name]), 400, "adapter_id_invalid")
    assert answer.raw.isascii()
    assert len(stage.hub.requests) == asked


@pytest.mark.parametrize("name", NO_LABEL)
def test_name_that_no_field_may_hold_is_400(stage, name):
    stage.refused(lambda: stage.complete(NO_LABEL[name]), 400, "invalid_request")


@pytest.mark.parametrize("name", ["21 link out of the root", "21 fifo", "21 socket", "21 device", "21 file", "21 absent"])
def test_what_is_no_adapter_directory_is_404_and_never_opened(stage, tmp_path, name):
    kind = name.rpartition(" ")[2]
    place = stage.writer.root / f"odd-{kind}"
    if kind == "root":
        place.symlink_to(type(stage.writer)(tmp_path).write("outside"))
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            here = os.getcwd()
            os.chdir(stage.writer.root)  # a socket's path has at most 107 characters
            bound.bind(place.name)
            os.chdir(here)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    elif kind == "file":
        place.write_text("{}")
    stage.refused(lambda: stage.complete(place.name), 404, "model_not_found")


def test_names_refused_again_cost_nothing(stage):
    stage.check_steady()
