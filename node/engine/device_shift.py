"""Penalties, biases and masks over the logits of many rows at once, on the device that computed them.

The same definitions as `node.engine.filters`, which takes a row at a time.

Shape letters: W rows of logits, n of them that are moved, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from node.engine.sampler import DrawRow, RowMask, is_shifted

_LARGEST = torch.finfo(torch.float32).max
_BITS = 32
_FORBID_BLOCK = 4096


def shift(x: Tensor, rows: Sequence[DrawRow], unseen: Tensor | None, at: Sequence[int] | None = None) -> None:
    """Apply penalties and bias to rows of x [W, V] in place, all at once.

    Semantics: `filters.penalise_repetition`, `penalise_output`, `add_bias`, row by row. unseen: [n] int64 on x's device, one more
    token of every row's output, or None. at: where in x the n rows are; None: they are all of it.
    """
    if not any(is_shifted(row.sampling) for row in rows):
        return
    at = range(len(rows)) if at is None else at
    _penalise_repetition(x, rows, unseen, at)
    _penalise_output(x, rows, unseen, at)
    biases = [(place, *pair) for place, row in zip(at, rows, strict=True) for pair in row.sampling.logit_bias]
    if biases:
        places, ids, values = zip(*biases, strict=True)
        flat = to_device(np.array(places, dtype=np.int64) * x.shape[1] + np.array(ids, dtype=np.int64), x.device)
        x.view(-1).index_add_(0, flat, to_device(np.array(values, dtype=np.float32), x.device))


def _penalise_repetition(x: Tensor, rows: Sequence[DrawRow], unseen: Tensor | None, at: Sequence[int]) -> None:
    asking = [place for place, row in enumerate(rows) if row.sampling.repetition_penalty != 1]
    if not asking:
        return
    flat, owners = _history(x, asking, [np.frombuffer(rows[place].tokens, dtype=np.int64) for place in asking], unseen, at)
    penalties = np.array([rows[place].sampling.repetition_penalty for place in asking], dtype=np.float64)
    penalty = to_device(penalties.astype(np.float32), x.device)[owners]
    values = x.view(-1)[flat]
    # A token that occurs twice is written twice, with the same value: all were read before any was written.
    x.view(-1)[flat] = torch.where(values > 0, values / penalty, values * penalty).clamp(max=_LARGEST)


def _penalise_output(x: Tensor, rows: Sequence[DrawRow], unseen: Tensor | None, at: Sequence[int]) -> None:
    asking = [p for p, row in enumerate(rows) if row.sampling.frequency_penalty != 0 or row.sampling.presence_penalty != 0]
    if not asking:
        return
    outputs = [np.frombuffer(rows[place].tokens, dtype=np.int64)[rows[place].prompt_count :] for place in asking]
    flat, owners = _history(x, asking, outputs, unseen, at)
    counts = torch.zeros_like(x).view(-1)
    counts.index_add_(0, flat, torch.ones_like(flat, dtype=x.dtype))
    sampling = [rows[place].sampling for place in asking]
    both = to_device(np.array([(s.frequency_penalty, s.presence_penalty) for s in sampling], dtype=np.float32), x.device)
    frequency, presence = both[owners].unbind(1)
    x.view(-1)[flat] = x.view(-1)[flat] - (counts[flat] * frequency + presence)


def _history(
    x: Tensor, asking: list[int], tokens: list[npt.NDArray[Any]], unseen: Tensor | None, at: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Every token of the asking rows as (place in the flattened x, index into `asking`), the unseen ones last."""
    lengths = [len(row) for row in tokens]
    starts = np.array([at[place] for place in asking], dtype=np.int64) * x.shape[1]
    flat = np.concatenate(tokens) + np.repeat(starts, lengths)
    both = to_device(np.stack((flat, np.repeat(np.arange(len(asking), dtype=np.int64), lengths))), x.device)
    places, owners = both.unbind(0)
    if unseen is not None:
        more = to_device(np.stack((np.array(asking, dtype=np.int64), starts)), x.device)
        places = torch.cat((places, unseen[more[0]] + more[1]))
        owners = torch.cat((owners, torch.arange(len(asking), device=x.device)))
    return places, owners


def forbid_rows(x: Tensor, mask: RowMask, indexes: Sequence[int], at: Sequence[int] | None = None) -> None:
    """Set what the masked rows may not draw to -inf, in place.

    Args:
        x: [n, V], or more rows where `at` is given.
        mask: Words of W rows, on x's device.
        indexes: The n rows of the mask.
        at: Where in x each of them is; None: x holds them in this order.
    """
    masked = set(mask.rows)
    pairs = [pair for pair in zip(indexes, range(len(indexes)) if at is None else at, strict=True) if pair[0] in masked]
    if not pairs:
        return
    both = to_device(np.array(pairs, dtype=np.int64).T, x.device)
    if x.is_cuda:
        _launch_forbid(x, mask.words, both)
        return
    bits = torch.arange(_BITS, dtype=torch.int32, device=x.device)
    is_allowed = (mask.words[both[0]].unsqueeze(2) >> bits) & 1
    is_allowed = is_allowed.view(len(pairs), -1)[:, : x.shape[1]].bool()
    x[both[1]] = x[both[1]].masked_fill(~is_allowed, float("-inf"))


def _launch_forbid(x: Tensor, words: Tensor, both: Tensor) -> None:
    from node.kernels.triton_sampling import forbid_kernel

    grid = (both.shape[1], -(-x.shape[1] // _FORBID_BLOCK))
    forbid_kernel[grid](x, words, both, x.shape[1], x.stride(0), words.stride(0), BLOCK=_FORBID_BLOCK, num_warps=4)


def to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Upload without waiting: from pinned memory, which torch keeps until the copy is done."""
    host = torch.from_numpy(np.ascontiguousarray(values).copy())
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
