"""What the API process and the fetching process say to each other: msgpack messages over two pipes, each after its length.

Down: one `FetchConfig`, then `Resolve`, `Verify` and `ListProgress`. Up: one `Started` or `StartFailed`, then one answer for each
job, in the order in which they end. The end of the input is the order to stop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from node.adapters.fetching.door import FetchedAdapter
from node.adapters.staging import Progress
from node.adapters.verify import VerifiedAdapter
from node.child_messages import framed
from node.request import LinearShape

MAX_MESSAGE_BYTES = 16 << 20  # a manifest has at most 1 MiB


class FetchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is told first: the adapters' settings as a JSON object, and the base model."""

    adapters: dict[str, Any]
    data_dir: str
    linears: tuple[LinearShape, ...]
    base_id: str
    hub_endpoint: str | None = None


class Resolve(msgspec.Struct, frozen=True, tag="resolve"):
    """Look a name up at a source, fetch what it stands for and verify it. `is_known`: it was fetched before, and is most likely
    here."""

    job_id: int
    source: str  # "hub", "pbase" or "store"
    name: str
    token: str | None = None
    is_known: bool = False

    def __repr__(self) -> str:
        """Without the token."""
        return f"Resolve({self.job_id}, {self.source!r}, {self.name!r})"


class Verify(msgspec.Struct, frozen=True, tag="verify"):
    """Verify the adapter in a directory."""

    job_id: int
    directory: str


class ListProgress(msgspec.Struct, frozen=True, tag="list_progress"):
    """Say which downloads are under way."""

    job_id: int


Job = Resolve | Verify | ListProgress


class Started(msgspec.Struct, frozen=True, tag="started"):
    """The process takes jobs."""


class StartFailed(msgspec.Struct, frozen=True, tag="start_failed"):
    """Instead of `Started`: the settings make no sense. `error` as `NodeError.to_json` has it."""

    error: dict[str, Any]


class Fetched(msgspec.Struct, frozen=True, tag="fetched"):
    """What a name stands for."""

    job_id: int
    found: FetchedAdapter


class Verified(msgspec.Struct, frozen=True, tag="verified"):
    """What is in a directory."""

    job_id: int
    verified: VerifiedAdapter


class Downloads(msgspec.Struct, frozen=True, tag="downloads"):
    """The downloads under way."""

    job_id: int
    items: tuple[Progress, ...]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Why a job has no other answer. `error` as `NodeError.to_json` has it."""

    job_id: int
    error: dict[str, Any]


Answer = Fetched | Verified | Downloads | Failed
Event = Started | StartFailed | Fetched | Verified | Downloads | Failed


def packed(message: msgspec.Struct) -> bytes:
    """A message as it goes through a pipe."""
    return framed(msgspec.msgpack.encode(message, enc_hook=_encode))


def job_decoder() -> msgspec.msgpack.Decoder[Job]:
    """Reads what goes down."""
    return msgspec.msgpack.Decoder(Job)


def event_decoder() -> msgspec.msgpack.Decoder[Event]:
    """Reads what comes up."""
    return msgspec.msgpack.Decoder(Event, dec_hook=_decode)


def _encode(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError


def _decode(kind: type, value: Any) -> Any:
    if issubclass(kind, Path):
        return Path(value)
    raise NotImplementedError
