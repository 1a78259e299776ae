"""Sizes that the settings leave open."""

import pytest

from node.config import AdapterSettings, EngineSettings
from node.engine.sizing import GRAPH_BYTES, memory_sizes, step_sizes
from node.errors import ConfigError

GIB = 1 << 30


def test_open_sizes_follow_the_device():
    cpu = step_sizes(EngineSettings(), AdapterSettings(), "cpu")
    gpu = step_sizes(EngineSettings(), AdapterSettings(), "cuda")
    assert (cpu.kv_block_size, cpu.max_sequences, cpu.max_batch_tokens, cpu.page_rank) == (16, 64, 512, 8)
    assert (gpu.kv_block_size, gpu.max_sequences, gpu.max_batch_tokens, gpu.page_rank) == (64, 256, 8192 + 256, 16)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_the_settings_say_is_kept(device):
    sizes = step_sizes(
        EngineSettings(kv_block_size=32, max_sequences=3, max_batch_tokens=99), AdapterSettings(page_rank=4), device
    )
    assert (sizes.kv_block_size, sizes.max_sequences, sizes.max_batch_tokens, sizes.page_rank) == (32, 3, 99, 4)


def test_memory_of_a_cpu_does_not_depend_on_the_machine():
    assert memory_sizes(EngineSettings(), AdapterSettings(), None).kv_cache_bytes == 256 << 20
    assert memory_sizes(EngineSettings(kv_cache_bytes=0), AdapterSettings(memory_bytes=5), None).adapter_bytes == 5


def test_gpu_memory_is_shared_out_to_the_last_byte():
    found = memory_sizes(EngineSettings(), AdapterSettings(), 64 * GIB, 3 * GIB)
    assert found.adapter_bytes == 15 * GIB
    assert found.kv_cache_bytes + found.adapter_bytes + 3 * GIB + GRAPH_BYTES == 64 * GIB


def test_gpu_memory_that_is_named_is_given():
    found = memory_sizes(EngineSettings(kv_cache_bytes=GIB), AdapterSettings(memory_bytes=2 * GIB), 64 * GIB)
    assert (found.kv_cache_bytes, found.adapter_bytes) == (GIB, 2 * GIB)
    assert memory_sizes(EngineSettings(), AdapterSettings(memory_bytes=2 * GIB), 64 * GIB).kv_cache_bytes == 61 * GIB


@pytest.mark.parametrize(
    ("free", "settings", "adapters"),
    [(GIB, {}, {}), (8 * GIB, {"kv_cache_bytes": 8 * GIB}, {}), (8 * GIB, {}, {"memory_bytes": 8 * GIB})],
)
def test_more_than_a_gpu_has_is_refused(free, settings, adapters):
    with pytest.raises(ConfigError, match="lower"):
        memory_sizes(EngineSettings(**settings), AdapterSettings(**adapters), free)
