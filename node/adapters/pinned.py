"""Page-locked host memory, from which a GPU copies at the full speed of its bus while nobody waits."""

from __future__ import annotations

import torch
from torch import Tensor

from node.errors import ConfigError


def allocate_pinned(size_bytes: int) -> Tensor:
    """[size_bytes] uint8, page-locked, allocated once for the life of the process.

    Raises:
        ConfigError: The system does not lock that much.
    """
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise ConfigError(
            f"adapters.host_memory_bytes is {size_bytes} and this machine does not page-lock that much memory; lower it"
        ) from error
