"""Which tokens may be drawn: penalties, bias, temperature and the four filters, each over the rows that ask for it.

Every function maps logits [n, V] float32 to logits [n, V], takes its parameter as [n, 1], and treats rows on their own: the bits
of a row's result do not depend on the other rows. Filtered tokens get -inf. Definitions follow transformers' logits processors,
with one difference: a filter's border is a value, not a rank, so tokens that tie with the last one kept are kept as well.

Shape letters: n rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

NUCLEUS_CANDIDATES = 1024  # a nucleus rarely holds more; sorting a whole vocabulary of 49,152 takes 20 times as long
_NEVER = float("-inf")
_WORD_BITS = 32
_FEW_WORDS = 64
_NEVER_BITS = np.float32(_NEVER).view(np.int32)
_LARGEST = torch.finfo(torch.float32).max
_SMALLEST = torch.finfo(torch.float32).tiny


def forbid(row: Tensor, words: np.ndarray) -> None:
    """Forbid tokens whose bit is not set, in place. row: [V] float32, CPU; words: [ceil(V / 32)] int32, as in `RowMask`."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little", count=row.shape[0])
    # Integer operations on the bits of the floats: 27 us for 49,152 tokens on one core, where masked_fill takes 170.
    keep = np.negative(bits.astype(np.int32))
    values = row.numpy().view(np.int32)
    np.bitwise_and(values, keep, out=values)
    np.bitwise_or(values, ~keep & _NEVER_BITS, out=values)


def best_allowed(row: Tensor, words: np.ndarray) -> int:
    """The token of the largest logit among those whose bit is set. row: [V] float32, CPU; words: as `forbid`.

    Where a grammar leaves few tokens, which is most of the time, only theirs are read: 10 us instead of 70.
    """
    ids = few_allowed(words, row.shape[0])
    if ids is not None:
        return int(ids[row.numpy()[ids].argmax()])
    copy = row.clone()
    forbid(copy, words)
    return int(copy.numpy().argmax())


def few_allowed(words: np.ndarray, vocab_size: int) -> np.ndarray | None:
    """The allowed tokens [k] int64, ascending, where they lie in few words; None where they do not."""
    filled = np.flatnonzero(words)
    if len(filled) > _FEW_WORDS:
        return None
    places = np.flatnonzero(np.unpackbits(words[filled].view(np.uint8), bitorder="little"))
    ids = filled[places // _WORD_BITS] * _WORD_BITS + places % _WORD_BITS
    return ids[ids < vocab_size]


def penalise_repetition(row: Tensor, token_ids: Tensor, penalty: float) -> None:
    """Divide positive and multiply negative logits of the tokens seen, in place. row: [V]; token_ids: [k] int64 (1909.05858).

    The result stays finite: float32 turns a tiny penalty into 0, and an infinite logit would make the whole row NaN later.
    """
    seen = torch.unique(token_ids)
    values = row[seen]
    row[seen] = torch.where(values > 0, values / penalty, values * penalty).clamp(max=_LARGEST)


def penalise_output(row: Tensor, output_ids: Tensor, frequency: float, presence: float) -> None:
    """Subtract count x frequency + presence from every token of the output, in place. row: [V]; output_ids: [k] int64."""
    if output_ids.numel():
        seen, counts = torch.unique(output_ids, return_counts=True)
        row[seen] -= counts * frequency + presence


def add_bias(row: Tensor, bias: Sequence[tuple[int, float]]) -> None:
    """Add the caller's biases, in place. row: [V]."""
    ids = torch.tensor([token_id for token_id, _ in bias])
    row[ids] += torch.tensor([value for _, value in bias], dtype=row.dtype)


def divide_by_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """Logits relative to the row's largest, over `temperature` [n, 1], which is positive before it is rounded to float32.

    Relative, because a tiny temperature then leads to -inf, never to +inf; and never below the smallest normal number, because
    0 / 0 is NaN. Both limits are the argmax.
    """
    return (logits - logits.amax(dim=1, keepdim=True)) / temperature.clamp(min=_SMALLEST)


def keep_top_k(logits: Tensor, counts: Tensor) -> Tensor:
    """Keep the `counts` [n, 1] int64 largest logits of each row; counts are at least 1."""
    largest = int(counts.max().clamp(max=logits.shape[1]))
    values = torch.topk(logits, largest, dim=1).values
    border = values.gather(1, (counts.clamp(max=largest) - 1))
    return logits.masked_fill(logits < border, _NEVER)


def keep_typical(logits: Tensor, mass: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest to the entropy until their probability reaches `mass` [n, 1] (2202.00666)."""
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, log_p * p, 0.0).sum(dim=1, keepdim=True)
    distance = (-log_p - entropy).abs()
    nearest, order = distance.sort(dim=1, stable=True)
    last = (p.gather(1, order).cumsum(dim=1) < mass).sum(dim=1, keepdim=True).clamp(max=logits.shape[1] - 1)
    return logits.masked_fill(distance > nearest.gather(1, last), _NEVER)


def keep_top_p(logits: Tensor, mass: Tensor) -> Tensor:
    """Keep the fewest most likely tokens whose probability reaches `mass` [n, 1] (1904.09751); at least one."""
    p = logits.softmax(dim=1)
    count = min(NUCLEUS_CANDIDATES, logits.shape[1])
    border, is_found = _nucleus_border(torch.topk(p, count, dim=1).values, mass)
    missing = (~is_found).nonzero()[:, 0]
    if missing.numel() and count < logits.shape[1]:
        descending = p[missing].sort(dim=1, descending=True).values
        border[missing] = _nucleus_border(descending, mass[missing])[0]
    return logits.masked_fill(p < border, _NEVER)


def _nucleus_border(descending: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The probability [n, 1] of the last token of the nucleus, and whether the candidates [n, c] held all of it."""
    reached = descending.cumsum(dim=1) >= mass
    index = torch.where(reached.any(dim=1), reached.int().argmax(dim=1), descending.shape[1] - 1)
    return descending.gather(1, index[:, None]), reached[:, -1]


def keep_min_p(logits: Tensor, share: Tensor) -> Tensor:
    """Keep the tokens at least `share` [n, 1] times as likely as the most likely one (2407.01082)."""
    border = logits.amax(dim=1, keepdim=True) + share.log()
    return logits.masked_fill(logits < border, _NEVER)
