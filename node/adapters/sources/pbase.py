"""Predibase's adapters: an endpoint turns "repository/version" into a path of an object store, where the files lie.

Source of the contract: LoRAX's `adapter_source: "pbase"` (GET /v2/repos/<name>/version/<number>, answered with `adapterPath`).
The public service was not tried; the endpoint is a setting.
"""

from __future__ import annotations

import json
from pathlib import Path

from node.adapters.locations import Location, parse_location
from node.adapters.names import AdapterName
from node.adapters.remote import RemoteVersion
from node.adapters.sources.stores import StoreSource
from node.adapters.sources.web import WebDoor
from node.errors import AdapterError, AdapterForbiddenError, AdapterNotFoundError, AdapterUnavailableError, ConfigError

MAX_ANSWER_BYTES = 64 << 10
RETRY_S = 10.0


class PbaseSource:
    """Resolves names at the endpoint and fetches from a store. Every method blocks: call them on a worker thread.

    Args:
        url: The endpoint. store_url: where adapter paths begin.
        stores: Reads the store.
        door: Asks the endpoint.

    Raises:
        ConfigError: A URL is malformed, or the store is not one of the operator's.
    """

    def __init__(self, url: str, store_url: str, stores: StoreSource, door: WebDoor) -> None:
        try:
            self._endpoint = parse_location(url, "http", may_be_root=True)
            self._root = parse_location(store_url, may_be_root=True)
            stores.require_allowed(self._root)
        except AdapterError as error:
            raise ConfigError(f"adapters.pbase_url and adapters.pbase_store: {error.message}") from error
        self._stores = stores
        self._door = door

    def look_up(self, name: AdapterName, token: str | None) -> RemoteVersion:
        """Ask the endpoint, with the client's own token, then the store. What needs a token is private."""
        if token is None:
            raise AdapterForbiddenError(
                f"{name}: source pbase needs the caller's api_token", code="adapter_gated", param="api_token"
            )
        found = self._stores.look_up(self._location(name, token), None)
        return RemoteVersion(found.revision, is_private=True, files=found.files)

    def fetch(self, name: AdapterName, found: RemoteVersion, token: str | None) -> Path:
        """Download what `look_up` found."""
        return self._stores.fetch(self._location(name, token or ""), found, None)

    def _location(self, name: AdapterName, token: str) -> Location:
        repository, slash, version = name.path.partition("/")
        if not slash or not version.isdecimal():
            raise AdapterNotFoundError(f"{name}: a pbase adapter is named repository/version, a number", param="model")
        url = Location(
            self._endpoint.scheme,
            self._endpoint.authority,
            (*self._endpoint.parts, "v2", "repos", repository, "version", version),
        )
        path = self._adapter_path(name, url, token)
        return parse_location(f"{self._root}/{path}" if self._root.parts else f"{self._root}{path}")

    def _adapter_path(self, name: AdapterName, url: Location, token: str) -> str:
        with self._door.get(url, {"Authorization": f"Bearer {token}"}) as answer:
            if answer.status in (401, 403):
                raise AdapterForbiddenError(f"pbase refuses {name} ({answer.status})", code="adapter_gated", param="model")
            if answer.status == 404:
                raise AdapterNotFoundError(f"pbase has no adapter {name}", param="model")
            body = b""
            for chunk in answer.chunks() if answer.status == 200 else ():
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    break
        try:
            path = json.loads(body[:MAX_ANSWER_BYTES])["adapterPath"]
        except (ValueError, KeyError, TypeError) as error:
            raise AdapterUnavailableError(
                f"pbase gives no adapter path for {name} (status {answer.status}); it may not be ready", retry_after_s=RETRY_S
            ) from error
        return str(path).strip("/")
