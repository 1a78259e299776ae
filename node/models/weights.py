"""A checkpoint as named tensors, whatever file format it came in."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from node.errors import ModelLoadError


class Weights(Protocol):
    """Reads one tensor at a time, so that the whole model is never in memory twice. Names are those of transformers."""

    def names(self) -> frozenset[str]:
        """Every tensor in the checkpoint."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        ...

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a new contiguous tensor on the CPU, converted to `dtype`."""
        ...


def read_checked(weights: Weights, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Read a tensor that must exist with this shape. See `check_shape`."""
    check_shape(weights, name, shape)
    return weights.read(name, dtype)


def check_shape(weights: Weights, name: str, shape: tuple[int, ...]) -> None:
    """Refuse a checkpoint whose tensor is not there or has another shape.

    Raises:
        ModelLoadError: model_corrupt. The tensor is missing, or its shape is not what the configuration says.
    """
    if name not in weights.names():
        raise ModelLoadError(
            f"the checkpoint has no tensor {name}, which its configuration calls for; download the model again",
            code="model_corrupt",
        )
    if weights.shape(name) != shape:
        raise ModelLoadError(
            f"tensor {name} has shape {list(weights.shape(name))} and the configuration calls for {list(shape)}; "
            "config.json and the weights belong to different models",
            code="model_corrupt",
        )
