"""Where a checkpoint's tensors go while a model is loaded: into memory one by one, or onto a GPU many at a time.

Shape letters: R rows, C columns of a matrix.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from node.errors import ModelLoadError
from node.models.safetensors_weights import SafetensorsWeights
from node.models.weights import Weights, check_shape, read_checked

Part = tuple[str, tuple[int, ...]]  # a tensor's name and the shape it must have

READ_THREADS = 8  # one core copies about 5 GB/s out of the page cache, the bus takes 50
STAGE_BYTES = 16 << 20  # of pinned memory, two of them a thread: one is filled while the other travels

logger = logging.getLogger(__name__)


class Placement(Protocol):
    """Reads tensors for the decoder. What `joined` returns may be incomplete until `finish`; `close` gives the rest up.

    Attributes:
        needs_room: Tensors on their way take more of the device's memory than their places.
    """

    needs_room: bool

    def joined(self, parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
        """One tensor, or several one below the other in the order given.

        Raises:
            ModelLoadError: model_corrupt. A tensor is missing or has another shape.
        """
        ...

    def finish(self) -> None:
        """Wait until everything is there.

        Raises:
            ModelLoadError: model_corrupt. A file cannot be read.
        """
        ...

    def close(self) -> None:
        """Nobody wants what has not arrived."""
        ...


class HostPlacement:
    """In main memory, one after another, so that the whole model is never there twice."""

    needs_room = False

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def joined(self, parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
        tensors = [read_checked(self._weights, name, shape, dtype) for name, shape in parts]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class DevicePlacement:
    """On a GPU: every tensor's final place is allocated at once and filled by threads, without a second copy of the model.

    Args:
        weights: The checkpoint. Safetensors files are read in pieces into pinned memory; others tensor by tensor.
        device: The GPU.
        threads: Reading threads.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        threads: int = READ_THREADS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.needs_room = False
        self._weights = weights
        self._device = device
        self._clock = clock
        self._begun_s = self._last_s = clock()
        self._size_bytes = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="weights")
        self._pending: list[Future[None]] = []
        self._local = threading.local()

    def joined(self, parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
        for name, shape in parts:
            check_shape(self._weights, name, shape)
        row_count = sum(shape[0] for _, shape in parts)
        whole = torch.empty((row_count, *parts[0][1][1:]), dtype=dtype, device=self._device)
        first = 0
        for name, shape in parts:
            self._schedule(name, whole[first : first + shape[0]])
            first += shape[0]
        return whole

    def finish(self) -> None:
        for future in self._pending:
            future.result()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the last pieces of each thread are on their way
        if self._pending:
            logger.info("%.2f GB of weights came in %.2f s", self._size_bytes / 1e9, self._last_s - self._begun_s)
        self._pending.clear()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _schedule(self, name: str, target: Tensor) -> None:
        self._size_bytes += target.nbytes
        if not isinstance(self._weights, SafetensorsWeights):
            self.needs_room = True
            self._pending.append(self._pool.submit(self._copy, name, target))
            return
        dtype = self._weights.extent(name).dtype
        self.needs_room |= dtype != target.dtype  # converted on the device
        flat = target.view(-1)
        for start, count in _pieces(flat.numel(), STAGE_BYTES // dtype.itemsize):
            self._pending.append(self._pool.submit(self._stage, self._weights, name, start, flat[start : start + count]))

    @torch.inference_mode()
    def _copy(self, name: str, target: Tensor) -> None:
        target.copy_(self._weights.read(name, target.dtype))
        self._last_s = self._clock()

    @torch.inference_mode()
    def _stage(self, weights: SafetensorsWeights, name: str, start: int, target: Tensor) -> None:
        """Bring elements `start` .. of a tensor to their place, over this thread's pinned memory and stream."""
        lane: _Lane | None = getattr(self._local, "lane", None)
        if lane is None:
            lane = self._local.lane = _Lane(self._device)
        extent = weights.extent(name)
        itemsize = extent.dtype.itemsize
        lane.send(extent.file, extent.offset + start * itemsize, extent.dtype, target)
        self._last_s = self._clock()


class _Lane:
    """One thread's two pinned pieces and its stream."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._pieces = [torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=self._is_gpu) for _ in range(2)]
        self._stream = torch.cuda.Stream(device) if self._is_gpu else None  # type: ignore[no-untyped-call]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def send(self, file: Path, offset: int, dtype: torch.dtype, target: Tensor) -> None:
        """Read target.numel() elements of `dtype` at `offset` and start their way to `target`."""
        turn, self._turn = self._turn, 1 - self._turn
        event = self._events[turn]
        if event is not None:
            event.synchronize()
        piece = self._pieces[turn][: target.numel() * dtype.itemsize]
        _read_exactly(file, offset, piece)
        if self._stream is None:
            target.copy_(piece.view(dtype))
            return
        with torch.cuda.stream(self._stream):
            target.copy_(piece.view(dtype), non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        self._events[turn] = done


def _read_exactly(file: Path, offset: int, target: Tensor) -> None:
    view = memoryview(target.numpy())  # type: ignore[arg-type]
    done = 0
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    raise ModelLoadError(f"{file} ended while it was read; download the model again", code="model_corrupt")
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read; check that it exists and its permissions", code="model_corrupt") from error


def _pieces(count: int, limit: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, limit):
        yield start, min(limit, count - start)
