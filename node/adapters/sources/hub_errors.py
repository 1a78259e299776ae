"""What the hub's library raises, in the node's words. The library's own texts are dropped: they may quote addresses, headers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from node.adapters.names import AdapterName
from node.adapters.staging import DISK_FAULTS, unstorable
from node.errors import (
    AdapterError,
    AdapterForbiddenError,
    AdapterIdError,
    AdapterNotFoundError,
    AdapterUnavailableError,
)

DEFAULT_RETRY_S = 10.0
MAX_RETRY_S = 300.0


# The transport's own error (time-outs, refused and broken connections), whichever HTTP library the hub's one is built on.
_TRANSPORT_ERROR = HfHubHTTPError.__bases__[0]
HUB_ERRORS: tuple[type[Exception], ...] = (_TRANSPORT_ERROR, HFValidationError, OSError, RuntimeError)


def is_broken_connection(error: Exception) -> bool:
    """Whether the hub gave no answer, or not all of it: asking again at once may do."""
    return isinstance(error, _TRANSPORT_ERROR) and not isinstance(error, HfHubHTTPError)


@contextmanager
def translated(name: AdapterName) -> Iterator[None]:
    """Run hub calls about `name`; their errors leave as AdapterError."""
    try:
        yield
    except HUB_ERRORS as error:
        raise from_hub(error, name) from error


def from_hub(error: Exception, name: AdapterName) -> AdapterError:
    """The node's error for one of the hub library's.

    401 and 403 mean a gated or private repository: the hub answers 401 for private and unknown ones alike.
    """
    if isinstance(error, HfHubHTTPError):
        return _from_status(error, name)
    if isinstance(error, HFValidationError):
        return AdapterIdError(f"{name} is not a name the hub can have", param="model")
    if isinstance(error, OfflineModeIsEnabled):
        return AdapterUnavailableError(
            f"{name} is not cached and this node is offline (HF_HUB_OFFLINE); go online once to fetch it"
        )
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return unstorable(error, name)
    return AdapterUnavailableError(f"the hub cannot be reached for {name}; try again", retry_after_s=DEFAULT_RETRY_S)


def _from_status(error: HfHubHTTPError, name: AdapterName) -> AdapterError:
    status = error.response.status_code
    if status in (401, 403) or isinstance(error, GatedRepoError):
        return AdapterForbiddenError(
            f"the hub refuses {name} ({status}): it is gated, private or absent; send a token that may read it",
            code="adapter_gated",
            param="model",
        )
    if status == 404 or isinstance(error, RepositoryNotFoundError):
        return AdapterNotFoundError(f"the hub has no adapter {name}, or not that revision", param="model")
    if status == 429 or status >= 500:
        return AdapterUnavailableError(
            f"the hub answers {status} for {name}; try again later", retry_after_s=_retry_after_s(error)
        )
    return AdapterUnavailableError(f"the hub answers {status} for {name}", retry_after_s=DEFAULT_RETRY_S)


def _retry_after_s(error: HfHubHTTPError) -> float:
    stated = error.response.headers.get("Retry-After", "")
    return min(float(stated), MAX_RETRY_S) if stated.isdecimal() else DEFAULT_RETRY_S
