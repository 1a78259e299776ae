"""Makes the GPU's context while torch is imported: the driver takes 0.3 s for it and needs nothing of Python meanwhile."""

from __future__ import annotations

import ctypes
import threading

_DRIVER = "libcuda.so.1"
_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
_OLDEST_MAJOR = 8  # as `node.engine.device` has it: no context on a GPU that is not used


def begin_context(device_setting: str) -> threading.Thread | None:
    """Begin it on a thread, where `model.device` may mean a GPU; torch finds it there, or makes its own where this failed.

    Returns:
        The thread; None where there is nothing to do.
    """
    if device_setting == "cpu":
        return None
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return None  # no GPU, or no driver: `choose_device` says so
    thread = threading.Thread(target=_make_context, args=(driver,), name="cuda-context", daemon=True)
    thread.start()
    return thread


def _make_context(driver: ctypes.CDLL) -> None:
    """The primary context of the first visible GPU, which is the one that torch starts with."""
    device, major, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return
    if driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device) or major.value < _OLDEST_MAJOR:
        return
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
