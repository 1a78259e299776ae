"""`GET /health` and its aliases, `GET /metrics`, `GET /v1/receipts/{id}`: how the node is, and what it has signed."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.samples import Sample

from node.api.answering import TENANT, Answering
from node.api.doors import Books
from node.api.readiness import Readiness
from node.errors import RequestError

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class StatusRoutes:
    """Small answers about the node itself."""

    def __init__(self, answering: Answering, readiness: Readiness, books: Books) -> None:
        self._answering = answering
        self._readiness = readiness
        self._books = books

    async def health(self, request: web.Request) -> web.Response:
        """200 with an empty body, as LoRAX has it, once a token was made and while records can be written; else 503."""
        await self._readiness.check()
        return web.Response()

    async def live(self, request: web.Request) -> web.Response:
        """200 while this process answers, whatever the engine does: restarting the node would help only if it did not."""
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        """Prometheus text, or LoRAX's JSON where it is asked for; rendered on a thread: a scrape must not hold up tokens."""
        registry = self._answering.metrics.registry
        wants_json = request.query.get("format") == "json" or request.headers.get("Accept") == "application/json"
        if wants_json:
            return self._answering.json(await asyncio.to_thread(_metrics_json, registry), {})
        body = await asyncio.to_thread(generate_latest, registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def receipt(self, request: web.Request) -> web.Response:
        """A signed receipt, for the API key that asked. Without keys, for whoever knows its id: 128 random bits."""
        request_id = request.match_info["id"]
        bundle = None
        if _REQUEST_ID.fullmatch(request_id):
            bundle = await self._books.receipt(request_id, request[TENANT])
        if bundle is None:
            raise RequestError(
                f"there is no receipt {request_id[:128]!r}; ids are in the x-openlora-receipt header of an answer",
                code="receipt_not_found",
            )
        return self._answering.json(bundle, {})


def _metrics_json(registry: CollectorRegistry) -> dict[str, Any]:
    """LoRAX's shape: every family with its samples, each under its labels as Prometheus writes them. A histogram's sum and count,
    whose labels are the same, begin with that word; times of creation are left out."""
    families: dict[str, Any] = {}
    for family in registry.collect():
        samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        data = [{"key": _key(sample, family.name), "value": sample.value} for sample in samples]
        families[family.name] = {"type": family.type, "data": data}
    return families


def _key(sample: Sample, family: str) -> str:
    labels = [f'{name}="{value}"' for name, value in sorted(sample.labels.items())]
    suffix = sample.name.removeprefix(family)
    return ",".join([suffix[1:], *labels] if suffix in ("_sum", "_count") else labels)
