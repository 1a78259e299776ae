"""Tensors beside an adapter's pages on a GPU, in the pages that it is charged for them: no memory that nobody planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from node.kernels.lora import EmbeddingDelta, SideTensors

ALIGN_BYTES = 256  # as the allocator's


class SideRoom:
    """Gives out pieces of pages, one behind the other.

    Args:
        pages: [n] each, contiguous, on a GPU.
        compute: The stream that reads them, on a GPU.
    """

    def __init__(self, pages: Sequence[Tensor], compute: torch.cuda.Stream | None = None) -> None:
        self._left = [page.view(torch.uint8) for page in pages]
        self._compute = compute

    def send(self, side: SideTensors, device: torch.device) -> SideTensors:
        """Start to copy all of them, on the current stream; returns them as they will be on the device."""

        def sent(tensor: Tensor) -> Tensor:
            return self._place(tensor, device).copy_(tensor, non_blocking=True)

        embedding = side.embedding
        if embedding is not None:
            gain = None if embedding.gain is None else sent(embedding.gain)
            embedding = EmbeddingDelta(sent(embedding.a), sent(embedding.b), gain)
        gains = {index: sent(tensor) for index, tensor in side.gains.items()}
        return SideTensors(gains, {index: sent(tensor) for index, tensor in side.biases.items()}, embedding)

    def _place(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Memory of a tensor's shape; the allocator's where what is left of every page is too short."""
        size = tensor.numel() * tensor.element_size()
        for index, left in enumerate(self._left):
            if size <= left.numel():
                self._left[index] = left[_aligned(size) :]
                return left[:size].view(tensor.dtype).view(tensor.shape)
        place = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if self._compute is not None:
            place.record_stream(self._compute)  # it may not be handed on while steps read it
        return place


def page_locked(side: SideTensors, allocate: Callable[[int], Tensor] | None = None) -> SideTensors:
    """The same in one piece of page-locked memory, from which a GPU copies while nobody waits.

    Args:
        allocate: That many bytes, uint8; None for page-locked ones.
    """
    size = sum(_aligned(tensor.nbytes) for tensor in _tensors(side))
    whole = torch.empty(size, dtype=torch.uint8, pin_memory=True) if allocate is None else allocate(size)
    return SideRoom([whole]).send(side, whole.device)


def _tensors(side: SideTensors) -> Iterator[Tensor]:
    yield from side.gains.values()
    yield from side.biases.values()
    if side.embedding is not None:
        yield from (side.embedding.a, side.embedding.b)
        if side.embedding.gain is not None:
            yield side.embedding.gain


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES
