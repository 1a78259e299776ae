"""Server-sent events on one HTTP response."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web


class EventStream:
    """Writes JSON events. Nothing is sent before the first event, so an error before it can still be a plain answer."""

    def __init__(self, request: web.Request, headers: dict[str, str]) -> None:
        self._request = request
        self._headers = headers
        self._response: web.StreamResponse | None = None

    @property
    def is_open(self) -> bool:
        """Whether the status line has left."""
        return self._response is not None

    def add_headers(self, headers: dict[str, str]) -> None:
        """Headers that became known; without effect once the stream is open."""
        self._headers.update(headers)

    async def send(self, event: Any) -> None:
        """One `data:` event. Raises ConnectionError when the client is gone."""
        response = await self._opened()
        await response.write(b"data: " + msgspec.json.encode(event) + b"\n\n")

    async def send_done(self) -> None:
        """OpenAI's end marker. Never on LoRAX's routes: lorax-client parses every event as JSON."""
        response = await self._opened()
        await response.write(b"data: [DONE]\n\n")

    async def close(self) -> web.StreamResponse:
        """End the response."""
        response = await self._opened()
        await response.write_eof()
        return response

    async def _opened(self) -> web.StreamResponse:
        if self._response is None:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **self._headers}
            self._response = web.StreamResponse(headers=headers)
            self._response.content_type = "text/event-stream"
            self._response.charset = "utf-8"
            await self._response.prepare(self._request)
        return self._response
