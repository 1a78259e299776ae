"""Bytes of one file at the hub, from an offset on.

The hub's library keeps nothing of a download that broke off (2.4: a file of its own for each call, removed on failure), counts
no bytes and waits as long as a 429 tells it to. Its addresses, headers and errors are used; the bytes go through our staging.
"""

from __future__ import annotations

from collections.abc import Iterator

from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from node.adapters.names import AdapterName
from node.adapters.remote import RemoteFile
from node.errors import AdapterUnavailableError


class HubFiles:
    """Reads files of the hub's repositories.

    Args:
        endpoint: The hub's address; None: HF_ENDPOINT, else the public hub.
    """

    def __init__(self, endpoint: str | None) -> None:
        self._endpoint = endpoint

    def read(self, name: AdapterName, commit: str, file: RemoteFile, token: str | None, offset: int) -> Iterator[bytes]:
        """The file's bytes from `offset` on, as they are stored.

        Redirects lead to the hub's storage; the token stays with the hub. Every read may take HF_HUB_DOWNLOAD_TIMEOUT seconds.

        Raises:
            HUB_ERRORS: The hub's refusal, or a connection that broke. AdapterUnavailableError: source_limit: compressed bytes.
        """
        url = hf_hub_url(name.path, file.name, revision=commit, endpoint=self._endpoint)
        headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
            hf_raise_for_status(answer)
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise AdapterUnavailableError(
                    f"the hub sends {file.name} compressed, which was not asked for", code="source_limit", retry_after_s=60.0
                )
            # Not everything between here and the hub knows ranges.
            surplus = offset if answer.status_code == 200 else 0
            for chunk in answer.iter_raw():  # as it arrives: what waits for a full chunk is lost when the connection breaks
                kept = chunk[surplus:]
                surplus -= len(chunk) - len(kept)
                if kept:
                    yield kept
