"""Metrics: one registry each, exact LoRAX names, one adapter series whatever changes."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from node.telemetry.metrics import EngineGauges, NodeMetrics


def gauges(running=(), waiting=()):
    return EngineGauges(True, 1, 2, 3, 12, 16, 4, running, waiting, (("engine_steps", "Steps", 7.0),))


def lines(metrics):
    return generate_latest(metrics.registry).decode().splitlines()


def test_two_nodes_in_one_process_share_no_counter():
    first, second = NodeMetrics(CollectorRegistry()), NodeMetrics(CollectorRegistry())
    first.output_tokens.inc(5)
    assert "openlora_output_tokens_total 5.0" in lines(first)
    assert "openlora_output_tokens_total 0.0" in lines(second)


def test_lorax_counters_have_no_suffix():
    metrics = NodeMetrics(CollectorRegistry())
    metrics.lorax_failure.labels("overloaded").inc()
    assert 'lorax_request_failure{err="overloaded"} 1.0' in lines(metrics)
    assert not any(line.startswith("lorax_request_failure_total") for line in lines(metrics))


def test_adapter_series_is_replaced_and_its_value_is_the_time_of_the_change():
    metrics, now, state = NodeMetrics(CollectorRegistry()), [100.0], [gauges(("a",), ())]
    metrics.watch_engine(lambda: state[0], lambda: now[0])
    first = [line for line in lines(metrics) if line.startswith("vllm:lora_requests_info{")]
    now[0] = 200.0
    same = [line for line in lines(metrics) if line.startswith("vllm:lora_requests_info{")]
    state[0] = gauges(("a", "b"), ("c",))
    changed = [line for line in lines(metrics) if line.startswith("vllm:lora_requests_info{")]
    assert first == same
    assert len(changed) == 1
    assert 'running_lora_adapters="a,b",waiting_lora_adapters="c"} 200.0' in changed[0]


def test_engine_gauges_use_the_gateways_names():
    metrics = NodeMetrics(CollectorRegistry())
    metrics.watch_engine(gauges, lambda: 0.0)
    text = lines(metrics)
    assert "vllm:num_requests_waiting 2.0" in text
    assert "vllm:kv_cache_usage_perc 0.25" in text
    assert 'vllm:cache_config_info{block_size="16",num_gpu_blocks="12"} 1.0' in text
    assert "openlora_engine_steps_total 7.0" in text


def test_empty_kv_cache_is_no_division_by_zero():
    metrics = NodeMetrics(CollectorRegistry())
    metrics.watch_engine(lambda: gauges()._replace(kv_total=0), lambda: 0.0)
    assert "vllm:kv_cache_usage_perc 0.0" in lines(metrics)
