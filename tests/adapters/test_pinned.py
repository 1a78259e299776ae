import gc

import pytest
import torch

from node.adapters.pinned import allocate_pinned, pinned_beside
from node.errors import ConfigError


class Runtime:
    """The CUDA runtime's two calls."""

    def __init__(self, status=0):
        self.status, self.locked, self.unlocked = status, [], []

    def cudaHostRegister(self, address, size_bytes, flags):
        self.locked.append((address, size_bytes))
        return self.status

    def cudaHostUnregister(self, address):
        self.unlocked.append(address)


def test_memory_is_locked_zero_and_unlocked_with_its_last_view(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = allocate_pinned(5_000_001)
    assert memory.shape == (5_000_001,)
    assert not memory.any()
    (address, size_bytes) = runtime.locked[0]
    assert (address, memory.data_ptr() % (2 << 20)) == (memory.data_ptr(), 0)
    assert size_bytes == 6 << 20
    view = memory[10:20]
    del memory
    gc.collect()
    assert not runtime.unlocked
    assert not view.any()
    del view
    gc.collect()
    assert runtime.unlocked == [address]


def test_refusal_of_the_system_names_the_setting(monkeypatch):
    runtime = Runtime(status=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(ConfigError, match=r"adapters\.host_memory_bytes is 1024"):
        allocate_pinned(1024)
    gc.collect()
    assert not runtime.unlocked


def test_memory_is_locked_when_the_block_has_ended(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pinned_beside() as allocate:
        memory = allocate(3 << 20)
        assert memory.shape == (3 << 20,)
    assert runtime.locked == [(memory.data_ptr(), 4 << 20)]
    assert not memory.any()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_memory_counts_as_pinned_and_can_be_taken_again():
    for _ in range(3):
        memory = allocate_pinned(8 << 20)
        assert memory.is_pinned()
        assert torch.equal(memory.to("cuda", non_blocking=True).cpu(), memory)
        del memory
        gc.collect()
