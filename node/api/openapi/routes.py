"""`GET /openapi.json` (LoRAX: `/api-doc/openapi.json`) and `GET /docs`."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from node.api.openapi.page import render_page

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class DocumentRoutes:
    """Answers with the document, built once.

    Args:
        document: From `build_document`.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self._json = msgspec.json.encode(document)
        self._page = render_page(document)

    async def document(self, request: web.Request) -> web.Response:
        """For programs."""
        return web.Response(body=self._json, content_type="application/json")

    async def page(self, request: web.Request) -> web.Response:
        """For people."""
        return web.Response(text=self._page, content_type="text/html", headers={"Content-Security-Policy": _POLICY})
