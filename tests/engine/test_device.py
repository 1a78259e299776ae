"""What depends on the device, as far as one without a GPU can tell."""

import threading

import pytest
import torch

from node.config import EngineSettings
from node.engine import device as subject
from node.engine.device import compiled_beside

CUDA = torch.device("cuda")


@pytest.fixture
def compiling(monkeypatch):
    """Set once the compiling thread may end; `names` are the threads that compiled."""
    may_end, names = threading.Event(), []

    def compile_sampler(device, vocab_size):
        assert may_end.wait(10)
        names.append(threading.current_thread().name)

    monkeypatch.setattr(subject, "_compile_sampler", compile_sampler)
    return may_end, names


def test_block_runs_while_the_sampler_is_compiled_and_ends_behind_it(compiling):
    may_end, names = compiling
    with compiled_beside(CUDA, 100):
        assert not names
        may_end.set()
    assert len(names) == 1
    assert names[0] != threading.current_thread().name
    assert names[0] not in {thread.name for thread in threading.enumerate()}


def test_who_needs_the_sampler_can_wait_for_it(compiling):
    may_end, names = compiling
    with compiled_beside(CUDA, 100) as wait:
        may_end.set()
        wait()
        assert len(names) == 1


def test_nothing_is_compiled_for_a_cpu(compiling):
    with compiled_beside(torch.device("cpu"), 100) as wait:
        wait()
    assert not compiling[1]


def test_compiler_that_fails_fails_the_start(monkeypatch):
    def broken(device, vocab_size):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(subject, "_compile_sampler", broken)
    with pytest.raises(RuntimeError, match="no compiler"), compiled_beside(CUDA, 100):
        pass


def test_model_that_fails_says_so_and_leaves_no_thread(compiling):
    compiling[0].set()
    with pytest.raises(LookupError), compiled_beside(CUDA, 100):
        raise LookupError("model")
    assert not any(thread.name.startswith("compile-sampler") for thread in threading.enumerate())


@pytest.mark.parametrize("is_built", [True, False])
def test_gpu_without_the_compiled_kernels_of_its_host_says_what_is_slower(monkeypatch, caplog, tmp_path, is_built):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(subject, "library_path", lambda: tmp_path if is_built else None)
    kernels = subject.open_kernels(CUDA, EngineSettings(kernels="reference"), None, None, torch.bfloat16)
    assert kernels.device == CUDA
    assert ("numpy reads adapters" in caplog.text) is not is_built
