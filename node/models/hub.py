"""Fetch a base model from the hub. `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and the rest work as documented."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that huggingface_hub uses: a connection that breaks in mid-download
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from node.errors import ModelLoadError

_PATTERNS = ("*.json", "*.safetensors", "*.gguf", "*.jinja", "tokenizer.model")  # never code, never pickles


def download(model_id: str, revision: str | None) -> Path:
    """Return a local directory with the model's files, from the cache where it is complete.

    Raises:
        ModelLoadError: model_not_found_on_disk. Unknown or gated model, unknown revision, or the hub cannot be reached.
    """
    shown = model_id if revision is None else f"{model_id}@{revision}"
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=list(_PATTERNS)))
    except GatedRepoError as error:
        raise _refused(f"the hub keeps {shown} gated; accept its terms there and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise _refused(f"the hub has {model_id} and no revision {revision}; correct model.revision") from error
    except RepositoryNotFoundError as error:
        raise _refused(f"the hub has no model {shown}, or it is private; correct model.path or set HF_TOKEN") from error
    except LocalEntryNotFoundError as error:
        raise _refused(
            f"{shown} is not cached and the hub cannot be reached; go online, unset HF_HUB_OFFLINE, or name a directory"
        ) from error
    except (HfHubHTTPError, HTTPError, HFValidationError, OSError) as error:
        raise _refused(f"fetching {shown} from the hub failed; try again or name a local directory") from error


def _refused(message: str) -> ModelLoadError:
    return ModelLoadError(message, code="model_not_found_on_disk")
