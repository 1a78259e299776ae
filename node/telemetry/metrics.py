"""The node's Prometheus metrics, on a registry that is handed in: two nodes in one process never share a counter.

Three families. `openlora_*` is ours, in base units. `lorax_*` keeps LoRAX's names so that its dashboards go on. The few `vllm:*`
series are what inference gateways read (queue, running, KV use, which adapters); their names and label names are fixed there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from node.telemetry.adapter_usage import SHOWN, AdapterUsage, Usage

# The bounds of OpenTelemetry's GenAI server metrics.
_REQUEST_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_COMMIT_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LORAX_SECONDS = tuple(0.0001 * 1.5**k for k in range(35))


class NodeMetrics:
    """Counters and histograms of the API process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        counter, histogram = _Makers(registry).counter, _Makers(registry).histogram
        self.requests = counter("openlora_requests", "Requests by how they ended", ("route", "outcome"))
        self.prompt_tokens = counter("openlora_prompt_tokens", "Prompt tokens of admitted requests")
        self.output_tokens = counter("openlora_output_tokens", "Output tokens of admitted requests")
        self.request_seconds = histogram("openlora_request_seconds", "From body read to last byte", _REQUEST_SECONDS)
        self.first_token_seconds = histogram("openlora_time_to_first_token_seconds", "To the first token", _FIRST_TOKEN_SECONDS)
        self.token_seconds = histogram("openlora_time_per_output_token_seconds", "Mean, after the first token", _TOKEN_SECONDS)
        self.adapter_usage = AdapterUsage()
        self.ledger_seconds = histogram("openlora_ledger_commit_seconds", "Until a record was durable", _COMMIT_SECONDS)
        self.lorax_requests = counter("lorax_request_count", "Requests, LoRAX's name", is_exact=True)
        self.lorax_success = counter("lorax_request_success", "Answered requests, LoRAX's name", is_exact=True)
        self.lorax_failure = counter("lorax_request_failure", "Failed requests, LoRAX's name", ("err",), is_exact=True)
        self.lorax_seconds = histogram("lorax_request_duration", "Seconds, LoRAX's name", _LORAX_SECONDS)
        self.lorax_validation = histogram(
            "lorax_request_validation_duration", "Seconds until admitted, LoRAX's name", _LORAX_SECONDS
        )
        self.lorax_inference = histogram("lorax_request_inference_duration", "Seconds from then on, LoRAX's name", _LORAX_SECONDS)
        self.lorax_token_seconds = histogram(
            "lorax_request_mean_time_per_token_duration", "Seconds a token, LoRAX's name", _LORAX_SECONDS
        )
        self.lorax_budget = histogram("lorax_request_max_new_tokens", "Output tokens at most, LoRAX's name", _token_bounds())
        self.lorax_input = histogram("lorax_request_input_length", "Prompt tokens, LoRAX's name", _token_bounds())
        self.lorax_output = histogram("lorax_request_generated_tokens", "Output tokens, LoRAX's name", _token_bounds())

    def watch_engine(self, read: Callable[[], EngineGauges], now: Callable[[], float]) -> None:
        """Publish the engine's own numbers at every scrape. `now` is UTC seconds, for the adapter series' timestamp value."""
        self.registry.register(_EngineCollector(read, now))


_USAGE = (
    ("requests", "Admitted requests with the adapter", "requests"),
    ("prompt_tokens", "Prompt tokens of those requests", "prompt_tokens"),
    ("output_tokens", "Tokens drawn for those requests", "output_tokens"),
)


class EngineGauges(NamedTuple):
    """What the engine says of itself, with adapters by the names that clients use."""

    is_up: bool
    running: int
    waiting: int
    kv_used: int
    kv_total: int
    kv_block_size: int
    adapter_slots: int
    running_adapters: tuple[str, ...]
    waiting_adapters: tuple[str, ...]
    counters: tuple[tuple[str, str, float], ...]
    usage: Mapping[str, Usage] = {}  # by adapter


class _Makers:
    """Metric constructors bound to one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, text: str, labels: tuple[str, ...] = (), *, is_exact: bool = False) -> Counter:
        """`is_exact` keeps a name without the `_total` that Prometheus clients add: LoRAX's names have none."""
        kind = _ExactCounter if is_exact else Counter
        return kind(name, text, labels, registry=self._registry)

    def histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=bounds, registry=self._registry)


class _ExactCounter(Counter):
    """A counter exposed as `name` instead of `name_total`."""

    def collect(self) -> Iterable[Metric]:
        for metric in super().collect():
            plain = Metric(metric.name, metric.documentation, "untyped")
            plain.samples = [
                sample._replace(name=metric.name) for sample in metric.samples if sample.name == f"{metric.name}_total"
            ]
            yield plain


class _EngineCollector:
    """Reads the engine's numbers when somebody asks."""

    def __init__(self, read: Callable[[], EngineGauges], now: Callable[[], float]) -> None:
        self._read = read
        self._now = now
        self._last: tuple[tuple[str, ...], tuple[str, ...]] | None = None
        self._changed_s = 0.0

    def collect(self) -> Iterable[Metric]:
        """One family at a time. The adapter series exists once, with today's label values, so it cannot grow."""
        gauges = self._read()
        used = gauges.kv_used / gauges.kv_total if gauges.kv_total else 0.0
        yield _gauge("openlora_engine_up", "Whether the engine process answers", float(gauges.is_up))
        yield _gauge("openlora_sequences_running", "Sequences in the batch", gauges.running)
        yield _gauge("openlora_sequences_waiting", "Sequences in the queue", gauges.waiting)
        yield _gauge("openlora_kv_cache_used_ratio", "Share of KV blocks in use", used)
        yield _gauge("openlora_adapters_resident", "Adapters in engine memory", len(gauges.running_adapters))
        for name, text, value in gauges.counters:
            family = CounterMetricFamily(f"openlora_{name}", text)
            family.add_metric([], value)
            yield family
        yield from self._by_adapter(gauges)
        yield _gauge("lorax_queue_length", "Sequences in the queue", gauges.waiting)
        yield _gauge("lorax_batch_current_size", "Sequences in the batch", gauges.running)
        yield _gauge("vllm:num_requests_running", "Sequences in the batch", gauges.running)
        yield _gauge("vllm:num_requests_waiting", "Sequences in the queue", gauges.waiting)
        yield _gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", used)
        yield self._cache_info(gauges)
        yield self._adapter_info(gauges)

    def _by_adapter(self, gauges: EngineGauges) -> Iterable[Metric]:
        for name, text, field in _USAGE:
            family = CounterMetricFamily(f"openlora_adapter_{name}", text, labels=["adapter"])
            for adapter, usage in gauges.usage.items():
                family.add_metric([adapter], getattr(usage, field))
            yield family
        resident = GaugeMetricFamily("openlora_adapter_resident", "1 for adapters a step may name now", labels=["adapter"])
        for adapter in gauges.running_adapters[:SHOWN]:
            resident.add_metric([adapter], 1)
        yield resident

    def _cache_info(self, gauges: EngineGauges) -> Metric:
        family = GaugeMetricFamily("vllm:cache_config_info", "KV cache geometry", labels=["block_size", "num_gpu_blocks"])
        family.add_metric([str(gauges.kv_block_size), str(gauges.kv_total)], 1)
        return family

    def _adapter_info(self, gauges: EngineGauges) -> Metric:
        """The value is the UTC time of the last change: routers let the newest timestamp win."""
        lists = (gauges.running_adapters, gauges.waiting_adapters)
        if lists != self._last:
            self._last, self._changed_s = lists, self._now()
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters resident and waited for", labels=labels)
        family.add_metric([str(gauges.adapter_slots), ",".join(lists[0]), ",".join(lists[1])], self._changed_s)
        return family


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _token_bounds() -> tuple[float, ...]:
    """Powers of two from 1 to 8192 tokens."""
    return tuple(float(1 << k) for k in range(14))
