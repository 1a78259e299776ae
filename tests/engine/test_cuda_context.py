import ctypes

import pytest

from node.engine import cuda_context as subject
from node.engine.cuda_context import begin_context


class Driver:
    """The calls of libcuda, on one GPU of this capability."""

    def __init__(self, major=9, init=0):
        self.major, self.init, self.called = major, init, []

    def cuInit(self, flags):
        self.called.append("init")
        return self.init

    def cuDeviceGet(self, device, ordinal):
        ctypes.cast(device, ctypes.POINTER(ctypes.c_int))[0] = 7
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        ctypes.cast(value, ctypes.POINTER(ctypes.c_int))[0] = self.major
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        self.called.append(("retain", device.value))
        return 0


@pytest.fixture
def begin(monkeypatch):
    def run(driver, setting="auto"):
        monkeypatch.setattr(subject.ctypes, "CDLL", lambda name: driver)
        thread = begin_context(setting)
        if thread is not None:
            thread.join()
        return driver.called

    return run


def test_context_of_the_first_gpu_is_made(begin):
    assert begin(Driver()) == ["init", ("retain", 7)]


@pytest.mark.parametrize("driver", [Driver(major=7), Driver(init=100)])
def test_gpu_that_is_too_old_or_not_there_gets_none(driver, begin):
    assert begin(driver) == ["init"]


def test_node_on_a_cpu_does_not_ask(begin):
    assert begin(Driver(), "cpu") == []


def test_machine_without_a_driver_has_nothing_to_begin(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(subject.ctypes, "CDLL", missing)
    assert begin_context("auto") is None
