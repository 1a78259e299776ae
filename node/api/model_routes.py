"""`GET /v1/models`, `GET /v1/models/{id}`, `GET /info`, `POST /tokenize`: what this node serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiohttp import web

from node.api.answering import TENANT, Answering
from node.api.body import read_json
from node.api.doors import Catalog, CatalogEntry
from node.api.fields import Fields
from node.config import ServerSettings
from node.engine.messages import Ready, Stats
from node.errors import ModelNotFoundError, RequestError
from node.tenancy.meter import TokenPrice


class ModelRoutes:
    """Describes the base model and the adapters that are known now."""

    def __init__(
        self,
        answering: Answering,
        catalog: Catalog,
        ready: Ready,
        server: ServerSettings,
        version: str,
        payment_terms: Mapping[str, Any] | None,
        price: TokenPrice,
        stats: Callable[[], Stats],
    ) -> None:
        self._answering = answering
        self._catalog = catalog
        self._ready = ready
        self._server = server
        self._version = version
        self._payment_terms = payment_terms
        self._price = {"input_token_wei": str(price.input_wei), "output_token_wei": str(price.output_wei)}
        self._stats = stats
        self._created_s = int(answering.now().timestamp())

    async def models(self, request: web.Request) -> web.Response:
        """The base model, then the adapters by name."""
        entries = sorted(self._entries(request), key=lambda entry: entry.name)
        state_of = adapter_states(self._stats())
        data = [self._base(), *(self._adapter(entry, state_of(entry.adapter_id)) for entry in entries)]
        return self._answering.json({"object": "list", "data": data}, {})

    async def model(self, request: web.Request) -> web.Response:
        """One of them."""
        name = request.match_info["id"]
        if name == self._ready.model_id:
            return self._answering.json(self._base(), {})
        for entry in self._entries(request):
            if name in (entry.name, entry.adapter_id):
                return self._answering.json(self._adapter(entry, adapter_states(self._stats())(entry.adapter_id)), {})
        raise ModelNotFoundError(
            f"the model {name[:200]!r} does not exist; GET /v1/models lists what this node knows", param="model"
        )

    def _entries(self, request: web.Request) -> Sequence[CatalogEntry]:
        """The adapters that exist for the caller."""
        tenancy, tenant = self._answering.tenancy, request[TENANT]
        return self._catalog.entries(tenancy.sees(tenant), tenancy.owner(tenant))

    def _base(self) -> dict[str, Any]:
        ready = self._ready
        return {
            **self._card(ready.model_id),
            "root": ready.model_id,
            "parent": None,
            "max_model_len": ready.max_model_len,
            "openlora": {"base_id": ready.base_id, "architecture": ready.architecture, "price": self._price, "state": "resident"},
        }

    def _adapter(self, entry: CatalogEntry, state: str) -> dict[str, Any]:
        return {
            **self._card(entry.name),
            "root": entry.name,
            "parent": self._ready.model_id,
            "max_model_len": self._ready.max_model_len,
            "openlora": {
                "adapter_id": entry.adapter_id,
                "base_id": self._ready.base_id,
                "rank": entry.rank,
                "manifest_hash": entry.manifest_hash,
                "price": self._price,
                "state": state,
            },
        }

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created_s, "owned_by": "openlora"}

    async def info(self, request: web.Request) -> web.Response:
        """LoRAX's `/info`, as far as its fields mean something here, with ours beside them."""
        ready, server = self._ready, self._server
        body = {
            "model_id": ready.model_id,
            "model_sha": ready.base_id,
            "model_dtype": f"torch.{ready.dtype}",
            "model_device_type": ready.device,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": server.max_concurrent_requests,
            "max_best_of": server.max_choices,
            "max_stop_sequences": server.max_stop_sequences,
            "max_input_length": ready.max_model_len - 1,
            "max_total_tokens": ready.max_model_len,
            "waiting_served_ratio": 0.0,
            "max_batch_total_tokens": ready.kv_block_count * ready.kv_block_size,
            "max_waiting_tokens": 0,
            "validation_workers": 1,
            "eager_prefill": False,
            "version": self._version,
            "sha": None,
            "docker_label": None,
            "request_logger_url": None,
            "openlora": {
                "architecture": ready.architecture,
                "kernels": ready.kernels,
                "max_rank": ready.max_rank,
                "payment": self._payment_terms,
            },
        }
        return self._answering.json(body, {})

    async def tokenize(self, request: web.Request) -> web.Response:
        """LoRAX's `/tokenize`: ids and texts with character offsets."""
        body = await read_json(request, self._answering.max_body_bytes, self._answering.body_timeout_s)
        fields = Fields(body)
        inputs = fields.text("inputs", self._answering.limits.max_text_chars)
        if not inputs:
            raise RequestError("`inputs` cannot be empty", param="inputs")
        adds_special = fields.boolean("add_special_tokens", default=True)
        spans = await self._answering.spans(inputs, adds_special)
        answer = [{"id": span.token_id, "text": span.text, "start": span.start, "stop": span.stop} for span in spans]
        return self._answering.json(answer, {})


def adapter_states(stats: Stats) -> Callable[[str], str]:
    """Where an adapter is now, by content hash: "resident" (a step may name it), "host" (in page-locked memory, one copy away
    from the GPU), "waiting" (requests wait for it) or "disk"."""
    states = dict.fromkeys(stats.waiting_adapters, "waiting")
    states.update(dict.fromkeys(stats.host_adapters, "host"))
    states.update(dict.fromkeys(stats.resident_adapters, "resident"))
    return lambda adapter_id: states.get(adapter_id, "disk")
