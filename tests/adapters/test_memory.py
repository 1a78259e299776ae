import pytest
import torch

from node.adapters import memory
from node.adapters.binding import LinearTable
from node.adapters.memory import MemoryLimits, machine_bytes, memory_limits, open_pool, read_threads
from node.config import AdapterSettings
from node.errors import ConfigError
from node.kernels.layout import PageLayout


@pytest.fixture
def layout(linears):
    return PageLayout([(name, shape.in_features, shape.out_features) for name, shape in LinearTable(linears).shapes.items()], 4)


def test_host_memory_is_twice_the_gpus_and_a_quarter_of_the_machines_at_most(monkeypatch):
    monkeypatch.setattr(memory, "machine_bytes", lambda: 1000)
    assert memory_limits(AdapterSettings(), 100).host_memory_bytes == 200
    assert memory_limits(AdapterSettings(), 400).host_memory_bytes == 250
    assert memory_limits(AdapterSettings(host_memory_bytes=7), 400).host_memory_bytes == 7


@pytest.mark.parametrize(("content", "expected"), [("4096\n", 4096), ("max\n", None), (None, None)])
def test_container_limit_counts_where_there_is_one(monkeypatch, tmp_path, content, expected):
    path = tmp_path / "memory.max"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(memory, "CGROUP_LIMIT", path)
    found = machine_bytes()
    assert found == expected if expected is not None else found > 1 << 28


def test_reading_leaves_cores_to_whoever_computes():
    assert read_threads("cpu", 64) == 1
    assert read_threads("cuda", 16) == 12
    assert read_threads("cuda", 2) == 1
    assert read_threads("cuda", 128) == memory.MAX_READ_THREADS


def test_pool_of_a_cpu_has_one_tier(layout, linears):
    limits = MemoryLimits(memory_bytes=10 * layout.page_elements * 4, host_memory_bytes=0, max_rank=8, max_adapter_bytes=1 << 20)
    pool = open_pool(layout, LinearTable(linears), torch.float32, limits, device=torch.device("cpu"))
    try:
        assert pool.page_count == 10
        assert pool.host_ids == ()
    finally:
        pool.close()


def test_loader_ends_when_the_pool_cannot_be_made(layout, linears, monkeypatch):
    ended = []
    monkeypatch.setattr(memory.AdapterLoader, "close", lambda loader: ended.append(loader))
    limits = MemoryLimits(memory_bytes=1, host_memory_bytes=0, max_rank=8, max_adapter_bytes=1 << 20)
    with pytest.raises(ConfigError, match="one page"):
        open_pool(layout, LinearTable(linears), torch.float32, limits, device=torch.device("cpu"))
    assert len(ended) == 1
