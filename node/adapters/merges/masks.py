"""DARE's masks: which elements of a tensor stay, decided by what the tensor is and by nothing else.

Rule, version openlora.dare/1: let S be the output of SHAKE-128 over the canonical JSON of {"schema": "openlora.dare/1",
"adapter_id": the adapter's content hash, "tensor": the tensor's normal name}, read as little-endian 32-bit integers. Element i of
the tensor, row-major as in the adapter's file, stays if and only if S[i] < floor(density * 2**32), with density an exact decimal.

So an adapter keeps the same elements in every merge (leaving another adapter out of the recipe changes nothing for it), and more
density keeps a superset. SHAKE-128 gives about 0.4 GB/s.
"""

from __future__ import annotations

import hashlib
import math
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from attribution import canonical

SCHEMA = "openlora.dare/1"


def keep_mask(adapter_id: str, tensor: str, shape: tuple[int, ...], density: Decimal) -> npt.NDArray[np.bool_]:
    """The elements of one tensor that stay.

    Args:
        adapter_id: Content hash, 64 hex digits. tensor: the tensor's normal name.
        shape: Of the tensor in its file. density: above 0, at most 1.
    """
    key = canonical.dumps({"schema": SCHEMA, "adapter_id": adapter_id, "tensor": tensor})
    count = math.prod(shape)
    drawn = np.frombuffer(hashlib.shake_128(key).digest(4 * count), dtype="<u4")
    bound = int(density * (1 << 32))
    if bound >= 1 << 32:
        return np.ones(shape, dtype=np.bool_)
    return (drawn < np.uint32(bound)).reshape(shape)
