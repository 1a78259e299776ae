"""Reads a plain adapter into its pages and hashes the very bytes it reads, on threads without the interpreter lock: in one pass,
or so that the pages are there before the hash is.

Writes the same bits as `node.adapters.page_filler`, which reads everything else.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from node.adapters.file_plan import DTYPE_CODES, FilePlan
from node.adapters.formats.layout import locate
from node.adapters.page_filler import Page
from node.adapters.regular_file import open_regular
from node.errors import AdapterChangedError
from node.kernels.layout import PageLayout

ROOT_BYTES = 32
SHORT_FILE = -1  # what `openlora_read_adapter` answers besides an errno
ITEM_BYTES = np.array([4, 2, 2])  # by `DTYPE_CODES`
KEPT_BYTES = 256 << 20  # of an adapter whose bytes are kept until they are hashed; larger ones are read in one pass


class _PageList(ctypes.Structure):
    """`OpenloraPages` in csrc/adapters/reader.h."""

    _fields_ = (
        ("pages", ctypes.c_void_p),
        ("page_count", ctypes.c_int64),
        ("page_elements", ctypes.c_int64),
        ("page_rank", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


class PageReader:
    """`csrc/adapters/reader.cc` behind ctypes.

    Args:
        library: The built kernels. layout: the model's pages.
        thread_count: Threads of a read; reads follow each other. urgent_count: of placing alone.
        max_bytes: Limit on an adapter's file.
    """

    def __init__(
        self, library: Path, layout: PageLayout, *, thread_count: int, max_bytes: int, urgent_count: int | None = None
    ) -> None:
        self._thread_count = thread_count
        self._urgent_count = max(thread_count, urgent_count or 0)
        self._layout = layout
        self._max_bytes = max_bytes
        functions = ctypes.CDLL(str(library))
        functions.openlora_reader_open.restype = ctypes.c_void_p
        functions.openlora_reader_close.argtypes = (ctypes.c_void_p,)
        self._read = functions.openlora_read_adapter
        self._read.restype = ctypes.c_int
        self._read.argtypes = (
            *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64),
            *(ctypes.POINTER(_PageList), ctypes.c_void_p),
        )
        self._place = functions.openlora_place_adapter
        self._place.restype = ctypes.c_int
        self._place.argtypes = self._read.argtypes[:-1]
        self._hash = functions.openlora_hash_placed
        self._hash.restype = ctypes.c_int
        self._hash.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
        self._turn = threading.Lock()  # from the pages of one adapter to their hash nobody else is read
        self._reader = functions.openlora_reader_open(self._urgent_count)
        if self._reader is None:
            raise MemoryError("no memory for the buffers of the adapter reader")
        self._end = weakref.finalize(self, functions.openlora_reader_close, self._reader)

    def close(self) -> None:
        """End the threads. Nobody may be reading."""
        self._end()

    def read(self, directory: Path, plan: FilePlan, pages: Sequence[Page]) -> list[str]:
        """Write every tensor of a plain adapter into `pages`, which nobody else touches meanwhile.

        The header is not looked at again: what stands in its tensors' places has the hash that was asked for, or is refused.

        Args:
            directory: Of the adapter. plan: what its header said.
            pages: Enough for the plan's rank, in rank order.

        Returns:
            The root of each tensor's tree hash, 64 hex digits, in file order.

        Raises:
            AdapterError: The file is gone, or shorter than the plan says.
            OSError: It cannot be read.
        """
        roots = _Roots(plan)
        with self._turn:
            self._call(self._read, self._thread_count, directory, plan, pages, roots.address)
        return roots.digits()

    def can_place(self, plan: FilePlan) -> bool:
        """Whether an adapter is small enough for `place_then_hash`."""
        tensors = plan.tensors
        return bool((tensors["rows"] * tensors["columns"] * ITEM_BYTES[tensors["dtype"]]).sum() <= KEPT_BYTES)

    def place_then_hash(self, directory: Path, plan: FilePlan, pages: Sequence[Page], placed: Callable[[], None]) -> list[str]:
        """The same, but `placed` is called when the pages are complete, before anything is known of their hash."""
        roots = _Roots(plan)
        with self._turn:
            self._call(self._place, self._urgent_count, directory, plan, pages)
            placed()
            # On fewer threads: beside a step that is launched, one of as many as there are cores would end long after the others.
            tensors = plan.tensors
            fault = self._hash(self._reader, self._thread_count, tensors.ctypes.data, len(tensors), roots.address)
            _check(fault, plan, pages)
        return roots.digits()

    def _call(self, function: Any, thread_count: int, directory: Path, plan: FilePlan, pages: Sequence[Page], *more: int) -> None:
        descriptor, _ = open_regular(locate(directory).weights, self._max_bytes)
        try:
            addresses = np.array([page.ctypes.data for page in pages], np.uint64)
            code = DTYPE_CODES["F32" if pages[0].dtype == np.float32 else "BF16"]
            target = _PageList(addresses.ctypes.data, len(pages), self._layout.page_elements, self._layout.page_rank, code)
            fault = function(
                *(self._reader, thread_count, descriptor),
                *(plan.tensors.ctypes.data, len(plan.tensors)),
                *(plan.placements.ctypes.data, len(plan.placements)),
                *(ctypes.byref(target), *more),
            )
        finally:
            os.close(descriptor)
        _check(fault, plan, pages)


class _Roots:
    """Memory for the root of each tensor's tree hash."""

    def __init__(self, plan: FilePlan) -> None:
        self._bytes = np.empty((len(plan.tensors), ROOT_BYTES), np.uint8)
        self.address = self._bytes.ctypes.data

    def digits(self) -> list[str]:
        digits = self._bytes.tobytes().hex()
        return [digits[start : start + 2 * ROOT_BYTES] for start in range(0, len(digits), 2 * ROOT_BYTES)]


def _check(fault: int, plan: FilePlan, pages: Sequence[Page]) -> None:
    """Raise what a call of the library answered."""
    if fault == SHORT_FILE:
        raise AdapterChangedError("the adapter's file became shorter after it was verified")
    if fault < 0:
        raise ValueError(f"a plan of rank {plan.rank} does not fit into {len(pages)} pages of this model")
    if fault > 0:
        raise OSError(fault, os.strerror(fault))
