from __future__ import annotations

import subprocess
import sys

import httpx2
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from node.errors import ModelLoadError
from node.models import hub

RESPONSE = httpx2.Response(404, request=httpx2.Request("GET", "https://hub.example/model"))


@pytest.mark.parametrize(
    ("failure", "named"),
    [
        (GatedRepoError("secret detail", response=RESPONSE), "gated"),
        (RepositoryNotFoundError("secret detail", response=RESPONSE), "no model owner/name"),
        (RevisionNotFoundError("secret detail", response=RESPONSE), "no revision v2"),
        (LocalEntryNotFoundError("secret detail"), "HF_HUB_OFFLINE"),
        (HfHubHTTPError("secret detail", response=RESPONSE), "try again"),
        (ConnectionError("secret detail"), "try again"),
        (httpx2.ReadTimeout("secret detail"), "try again"),
    ],
)
def test_download_failure_says_what_to_do(failure, named, monkeypatch):
    def fail(*args, **options):
        raise failure

    monkeypatch.setattr(hub, "snapshot_download", fail)

    with pytest.raises(ModelLoadError) as caught:
        hub.download("owner/name", "v2")

    assert named in caught.value.message
    assert "secret detail" not in caught.value.message
    assert caught.value.error_code == "model_not_found_on_disk"


def test_download_asks_for_data_only(tmp_path, monkeypatch):
    options = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda model_id, **given: options.update(given) or str(tmp_path))

    assert hub.download("owner/name", None) == tmp_path
    assert not {"*", "*.py", "*.bin", "*.pt", "*.pkl"} & set(options["allow_patterns"])


def test_download_offline_without_cache_is_refused(tmp_path):
    program = (
        "from node.errors import ModelLoadError\nfrom node.models.source import resolve\n"
        "try:\n    resolve('owner/name')\nexcept ModelLoadError as error:\n    print(error.error_code, error.message)"
    )
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}

    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)

    assert result.stdout.startswith("model_not_found_on_disk owner/name is not cached")
