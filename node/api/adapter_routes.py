"""Loading and unloading adapters while the node runs, in vLLM's words and in SGLang's.

A caller's names are its own: they resolve, and are listed, for nobody else. Loading fetches and verifies the adapter, gives it
the name and brings it into memory; unloading takes the name back and lets the memory go once no running request needs it.
Sources: vLLM 0.33 `entrypoints/serve/lora`, SGLang 0.5.23 `entrypoints/http_server.py`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from aiohttp import web

from node.adapters.locations import SOURCES
from node.api.answering import TENANT, Answering
from node.api.body import read_json
from node.api.doors import Catalog, CatalogEntry, Engine
from node.api.fields import Fields
from node.errors import NodeError, OverloadedError, RequestError
from node.request import AdapterTerm

_MAX_NAME_CHARS = 1024


class AdapterRoutes:
    """The four routes.

    Args:
        base_name: A name nobody may give to an adapter.
    """

    def __init__(self, answering: Answering, catalog: Catalog, engine: Engine, base_name: str) -> None:
        self._answering = answering
        self._catalog = catalog
        self._engine = engine
        self._base_name = base_name

    async def load(self, request: web.Request) -> web.Response:
        """`POST /v1/load_lora_adapter`."""
        fields = await self._fields(request)
        entry = await self._load(request, fields, replaces=fields.boolean("load_inplace"))
        return web.Response(text=f"Success: LoRA adapter {entry.name!r} added successfully.")

    async def unload(self, request: web.Request) -> web.Response:
        """`POST /v1/unload_lora_adapter`."""
        fields = await self._fields(request)
        name = await self._unload(request, fields)
        return web.Response(text=f"Success: LoRA adapter {name!r} removed successfully.")

    async def load_sglang(self, request: web.Request) -> web.Response:
        """`POST /load_lora_adapter`: success or failure is in the body, with status 200 or 400."""
        try:
            fields = await self._fields(request)
            fields.refuse("pinned", False, remedy="adapters stay in memory as long as they are used")
            await self._load(request, fields, replaces=False)
        except NodeError as error:
            return self._outcome(request, error)
        return self._outcome(request, None)

    async def unload_sglang(self, request: web.Request) -> web.Response:
        """`POST /unload_lora_adapter`."""
        try:
            await self._unload(request, await self._fields(request))
        except NodeError as error:
            return self._outcome(request, error)
        return self._outcome(request, None)

    async def _fields(self, request: web.Request) -> Fields:
        return Fields(await read_json(request, self._answering.max_body_bytes, self._answering.body_timeout_s))

    async def _load(self, request: web.Request, fields: Fields, *, replaces: bool) -> CatalogEntry:
        name = _required(fields, "lora_name")
        if name == self._base_name:
            raise RequestError(f"{name!r} is the base model; give the adapter another name", param="lora_name")
        path = _required(fields, "lora_path")
        source = fields.label("adapter_source", 32)
        if source is not None and source.lower() not in SOURCES:
            raise fields.error("adapter_source", f"must be one of {', '.join(SOURCES)}")
        fields.refuse("is_3d_lora_weight", False, remedy="adapters of stacked experts are not served")
        tenancy, tenant = self._answering.tenancy, request[TENANT]
        entry, before = await self._catalog.register(
            name,
            path,
            None if source is None else source.lower(),
            fields.label("api_token", 4096),
            owner=tenancy.owner(tenant),
            replaces=replaces,
            sees=tenancy.sees(tenant),
        )
        with suppress(OverloadedError):  # the name is given; a full command queue only means that its first request loads it
            if before is not None and before.adapter_id != entry.adapter_id:
                self._let_go(request, before)
            self._engine.prefetch(AdapterTerm(entry.adapter_id, str(entry.directory), 1.0))
        return entry

    async def _unload(self, request: web.Request, fields: Fields) -> str:
        fields.ignore("lora_int_id")
        tenancy, tenant, name = self._answering.tenancy, request[TENANT], _required(fields, "lora_name")
        owner = tenancy.owner(tenant)
        entry, was_own = await self._catalog.unregister(name, owner=owner, sees=tenancy.sees(tenant))
        if entry is None:  # given before a restart and not used since: nothing of it is in memory
            return name
        if was_own or not owner:
            with suppress(OverloadedError):  # the name is taken back; what nobody uses leaves memory by itself, only later
                self._let_go(request, entry)
        return name

    def _let_go(self, request: web.Request, entry: CatalogEntry) -> None:
        """Free the memory of what an owner's name stood for. Other tenants may use the same adapter under a name that everybody
        has: what one of them loads and unloads must not cost the others a load."""
        tenancy, tenant = self._answering.tenancy, request[TENANT]
        owner = tenancy.owner(tenant)
        left = self._catalog.entries(tenancy.sees(tenant), owner)
        if not owner or all(other.adapter_id != entry.adapter_id for other in left):
            self._engine.evict(entry.adapter_id)

    def _outcome(self, request: web.Request, error: NodeError | None) -> web.Response:
        tenancy, tenant = self._answering.tenancy, request[TENANT]
        owner = tenancy.owner(tenant)
        entries = self._catalog.entries(tenancy.sees(tenant), owner)
        body: dict[str, Any] = {
            "success": error is None,
            "error_message": None if error is None else error.message,
            "loaded_adapters": {entry.name: self._catalog.target(entry.name, owner) or entry.name for entry in entries},
        }
        if error is not None:
            body["code"] = error.error_code
            self._answering.count_failure(request, error)
        answer = self._answering.json(body, {})
        answer.set_status(200 if error is None else 400)
        return answer


def _required(fields: Fields, key: str) -> str:
    value = fields.label(key, _MAX_NAME_CHARS)
    if not value:
        raise fields.error(key, "is required")
    return value
