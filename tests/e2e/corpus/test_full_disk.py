"""Corpus A, 28: a disk with no room for a download, real and small, on a node of its own."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.adapters.conftest import encode_file
from tests.adapters.test_stores import WEIGHTS
from tests.e2e.corpus.conftest import open_stage
from tests.e2e.corpus.test_adapter_sources import padded

pytestmark = pytest.mark.e2e

# A mount of its own in a namespace of its own: nobody else sees it, and it ends with the node.
STARTER = """#!/bin/sh
exec unshare -rm sh -c 'mkdir -p "$OPENLORA_ADAPTERS__CACHE_DIR" \\
    && mount -t tmpfs -o size=128k small "$OPENLORA_ADAPTERS__CACHE_DIR" && exec "$0" "$@"' {program} "$@"
"""


def can_mount() -> bool:
    """Whether this machine lets its users have namespaces."""
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.skipif(not can_mount(), reason="unshare with a mount of one's own is not allowed here")
def test_28_full_disk_is_507_and_what_is_here_goes_on(kit, tmp_path):
    starter = tmp_path / "starter"
    starter.write_text(STARTER.format(program=kit.command[0]))
    os.chmod(starter, 0o755)
    settings = {"OPENLORA_ADAPTERS__CACHE_DIR": str(tmp_path / "cache"), "OPENLORA_ADAPTERS__CACHE_BYTES": "1GiB"}
    (tmp_path / "root").mkdir()
    with open_stage(kit, tmp_path / "root", str(starter), **settings) as stage:
        stage.hub.publish("owner/large", stage.far.write("large"))
        stage.hub.repositories["owner/large"][2][WEIGHTS] = padded(encode_file(stage.far.tensors()), 400_000)
        answer = stage.refused(lambda: stage.complete("owner/large"), 507, "cache_full")
        assert int(answer.headers["retry-after"]) >= 1
        assert str(tmp_path) not in answer.message
        stage.hub.publish("owner/small", stage.far.write("small"))
        with stage.watched(admitted=1):
            assert stage.complete("owner/small").status == 200
