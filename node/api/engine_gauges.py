"""The engine's counters as metrics, with adapters by the names that clients use."""

from __future__ import annotations

from node.api.doors import Services
from node.telemetry.metrics import EngineGauges

_COUNTERS = {
    "engine_steps": ("Steps of the engine", "steps_total"),
    "engine_prompt_tokens": ("Prompt tokens computed or found cached", "prompt_tokens_total"),
    "engine_cached_prompt_tokens": ("Prompt tokens found in the prefix cache", "cached_prompt_tokens_total"),
    "engine_output_tokens": ("Tokens drawn", "output_tokens_total"),
    "engine_preemptions": ("Sequences set back because KV blocks ran out", "preemptions_total"),
    "adapter_loads": ("Adapters brought into engine memory", "adapter_loads_total"),
    "adapter_evictions": ("Adapters put out of engine memory", "adapter_evictions_total"),
    "adapter_load_seconds": ("Time spent loading adapters", "adapter_load_seconds_total"),
}


def read_gauges(services: Services) -> EngineGauges:
    """The newest numbers. Only adapters with a public name are shown: whoever reads metrics must not learn of one that is private
    here or at its source, nor of what a tenant merged. Called on the thread that renders metrics."""
    stats, is_public = services.engine.stats, services.tenancy.is_public
    entries = services.catalog.entries(lambda _: True, "")
    names = {entry.adapter_id: entry.name for entry in entries if is_public(entry.name)}
    return EngineGauges(
        is_up=services.engine.is_alive,
        running=stats.running,
        waiting=stats.waiting,
        kv_used=stats.kv_blocks_used,
        kv_total=stats.kv_blocks_total,
        kv_block_size=services.ready.kv_block_size,
        adapter_slots=stats.adapter_slots,
        running_adapters=tuple(sorted(names[item] for item in stats.resident_adapters if item in names)),
        waiting_adapters=tuple(sorted(names[item] for item in stats.waiting_adapters if item in names)),
        usage=services.metrics.adapter_usage.shown(names),
        counters=tuple((name, text, float(getattr(stats, field))) for name, (text, field) in _COUNTERS.items()),
    )
