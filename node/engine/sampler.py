"""The next token of every row, and its log-probabilities.

Rows share operations, never results: what a row draws has the same bits whatever else is in the batch. The noise of a draw is one
number per row (`node.engine.noise`), turned into a token by inverting the cumulative distribution; Gumbel noise for every token
of the vocabulary would draw from the same distribution and costs 49,152 hashes a row.

Shape letters: W rows that want logits, n rows of one kind, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from node.engine import filters
from node.engine.noise import uniform
from node.request import DrawnToken, Sampling, TokenLogprob


@dataclass(frozen=True, slots=True)
class DrawRow:
    """What the sampler knows of one row. `tokens` are prompt and output so far; the token drawn gets position len(tokens)."""

    sampling: Sampling
    choice_index: int
    tokens: array[int]
    prompt_count: int


class TokenMask(Protocol):
    """What rows with a grammar may draw, asked as little as possible: a mask takes longer than a question about one token."""

    @property
    def rows(self) -> list[int]: ...

    def forbids(self, row: int, token_id: int) -> bool: ...

    def words_of(self, rows: Sequence[int]) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class RowMask:
    """What rows with a grammar may draw. `words`: [W, ceil(V / 32)] int32, bit i of word w allows token 32 w + i; `rows`: those
    whose words forbid anything."""

    rows: list[int]
    words: Tensor

    def forbids(self, row: int, token_id: int) -> bool:
        """Whether a row with a grammar may not draw a token; the words are on the CPU."""
        return not int(self.words.numpy()[row, token_id // 32]) >> token_id % 32 & 1

    def words_of(self, rows: Sequence[int]) -> np.ndarray:
        """The words of some rows; they are on the CPU."""
        return self.words.numpy()[list(rows)]


def draw(logits: Tensor, rows: Sequence[DrawRow], mask: TokenMask | None = None) -> list[DrawnToken | None]:
    """Draw one token a row.

    Args:
        logits: [W, V] float32, unmodified.
        rows: W of them.
        mask: Tokens allowed; None allows all. Log-probabilities stay those of the unmasked distribution.

    Returns:
        One token a row; None where the logits are not finite, so that nobody is served noise as an answer.
    """
    if not rows:
        return []
    best, token_ids = logits.max(dim=1)
    # max propagates NaN, so a row is sound exactly when its largest logit is finite.
    is_sound = best.isfinite().tolist()
    chosen = token_ids.tolist()
    if mask is not None:
        plain = [index for index in mask.rows if is_sound[index] and is_plain(rows[index].sampling)]
        _replace_forbidden(chosen, logits, mask, plain)
    special = [index for index, row in enumerate(rows) if not is_plain(row.sampling) and is_sound[index]]
    if special:
        drawn = _draw_special(logits, [rows[i] for i in special], special, mask)
        for index, token_id in zip(special, drawn, strict=True):
            chosen[index] = token_id
    logprobs = _logprobs(logits, rows, chosen, is_sound)
    return [(logprobs.get(index) or DrawnToken(token_id)) if is_sound[index] else None for index, token_id in enumerate(chosen)]


def _replace_forbidden(chosen: list[int], logits: Tensor, mask: TokenMask, indexes: list[int]) -> None:
    """The best token of all is often allowed, and then it is the best of those allowed; where it is not, find that one."""
    stopped = [index for index in indexes if mask.forbids(index, chosen[index])]
    if stopped:
        for index, words in zip(stopped, mask.words_of(stopped), strict=True):
            chosen[index] = filters.best_allowed(logits[index], words)


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """A prompt under the logits before it. `token_ids`, `logprobs`: [n]; `top_ids`, `top_logprobs`: [n, k], best first."""

    token_ids: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def tolist(self) -> list[DrawnToken]:
        """The tokens, on the host."""
        columns = (self.token_ids, self.logprobs, self.top_ids, self.top_logprobs)
        return [
            DrawnToken(token_id, logprob, tuple(map(TokenLogprob, ids, values)))
            for token_id, logprob, ids, values in zip(*(column.tolist() for column in columns), strict=True)
        ]


def score_prompt(logits: Tensor, token_ids: Tensor, top: int) -> ScoredPrompt:
    """Log-probabilities of a prompt, on the device of its logits; nothing waits for it.

    Args:
        logits: [n, V] float32. token_ids: [n] int64, the token after each row.
        top: k. How many of the most likely tokens are named beside each.
    """
    log_p = logits.log_softmax(dim=1)
    best = torch.topk(log_p, min(top, log_p.shape[1]), dim=1)
    return ScoredPrompt(token_ids, log_p.gather(1, token_ids[:, None])[:, 0], best.indices, best.values)


def is_plain(sampling: Sampling) -> bool:
    """Greedy and unpenalised: the argmax is the answer."""
    return sampling.temperature == 0 and not is_shifted(sampling)


def is_shifted(sampling: Sampling) -> bool:
    """Whether penalties or a bias move the logits."""
    return (
        sampling.repetition_penalty != 1
        or sampling.frequency_penalty != 0
        or sampling.presence_penalty != 0
        or bool(sampling.logit_bias)
    )


def _draw_special(logits: Tensor, rows: list[DrawRow], indexes: list[int], mask: TokenMask | None) -> list[int]:
    """Draw for rows that are not plain. logits: [W, V]; rows and indexes: n."""
    words = {} if mask is None else _words(mask, indexes)
    few = {index: ids for index, held in words.items() if (ids := filters.few_allowed(held, logits.shape[1])) is not None}
    drawn = {index: _draw_few(logits[index], row, few[index]) for index, row in zip(indexes, rows, strict=True) if index in few}
    rest = [place for place, index in enumerate(indexes) if index not in few]
    if rest:
        kept = [indexes[place] for place in rest]
        drawn.update(zip(kept, _draw_full(logits[kept], [rows[place] for place in rest], kept, words), strict=True))
    return [drawn[index] for index in indexes]


def _words(mask: TokenMask, indexes: list[int]) -> dict[int, np.ndarray]:
    """The masks of those rows that have a grammar."""
    constrained = set(mask.rows)
    wanted = [index for index in indexes if index in constrained]
    return dict(zip(wanted, mask.words_of(wanted), strict=True)) if wanted else {}


def _draw_few(row: Tensor, asked: DrawRow, ids: np.ndarray) -> int:
    """Draw among a few allowed tokens, without a whole vocabulary's softmax. row: [V]; ids: [k] ascending."""
    if is_shifted(asked.sampling):
        row = row.clone()
        _shift(row, asked)
    x = row[torch.from_numpy(ids)][None]
    place = draw_random(x, [asked])[0] if asked.sampling.temperature > 0 else int(x.argmax())
    return int(ids[place])


def _draw_full(x: Tensor, rows: list[DrawRow], indexes: list[int], words: dict[int, np.ndarray]) -> list[int]:
    """Draw from whole rows. x: [n, V], a copy: the caller's logits stay unmodified."""
    for index, row in enumerate(rows):
        if is_shifted(row.sampling):
            _shift(x[index], row)
    # After penalties and bias, which could lift a forbidden token again; before the filters, which keep the best of the rest.
    for place, index in enumerate(indexes):
        if index in words:
            filters.forbid(x[place], words[index])
    chosen = x.argmax(dim=1).tolist()
    random = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
    if random:
        drawn = draw_random(x[random], [rows[index] for index in random])
        for index, token_id in zip(random, drawn, strict=True):
            chosen[index] = token_id
    return chosen


def _shift(row: Tensor, asked: DrawRow) -> None:
    """Apply penalties and bias to one row [V], in place."""
    sampling = asked.sampling
    tokens = torch.from_numpy(np.frombuffer(asked.tokens, dtype=np.int64).copy())
    if sampling.repetition_penalty != 1:
        filters.penalise_repetition(row, tokens, sampling.repetition_penalty)
    if sampling.frequency_penalty or sampling.presence_penalty:
        filters.penalise_output(row, tokens[asked.prompt_count :], sampling.frequency_penalty, sampling.presence_penalty)
    if sampling.logit_bias:
        filters.add_bias(row, sampling.logit_bias)


def draw_random(x: Tensor, rows: list[DrawRow], ahead: int = 0) -> list[int]:
    """Temperature, filters in the order of `Sampling`, then one draw a row.

    Args:
        x: [n, V] float32. Logits after penalties, bias and masks, all finite or -inf, on the CPU.
        rows: n of them. ahead: tokens drawn that `rows` do not hold yet; they count in the position.
    """
    x = filters.divide_by_temperature(x, torch.tensor([[row.sampling.temperature] for row in rows], dtype=x.dtype))
    _apply(x, rows, filters.keep_top_k, lambda s: s.top_k, off=0, dtype=torch.int64)
    _apply(x, rows, filters.keep_typical, lambda s: s.typical_p, off=1.0)
    _apply(x, rows, filters.keep_top_p, lambda s: s.top_p, off=1.0)
    _apply(x, rows, filters.keep_min_p, lambda s: s.min_p, off=0.0)
    cumulative = x.softmax(dim=1).double().cumsum(dim=1)
    noise = [[uniform(row.sampling.seed, row.choice_index, len(row.tokens) + ahead)] for row in rows]
    total = cumulative[:, -1:].contiguous()
    target = torch.tensor(noise, dtype=torch.float64) * total
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # The product may round up to the total; the last token of positive probability is then the answer.
    last = torch.searchsorted(cumulative, total)[:, 0]
    return torch.minimum(index, last).tolist()


def _apply(
    x: Tensor,
    rows: list[DrawRow],
    keep: Callable[[Tensor, Tensor], Tensor],
    parameter: Callable[[Sampling], float],
    *,
    off: float,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Run one filter over the rows of `x` [n, V] that ask for it, in place."""
    asking = [index for index, row in enumerate(rows) if parameter(row.sampling) != off]
    if asking:
        values = torch.tensor([[parameter(rows[index].sampling)] for index in asking], dtype=dtype)
        x[asking] = keep(x[asking], values)


def _logprobs(logits: Tensor, rows: Sequence[DrawRow], chosen: list[int], is_sound: list[bool]) -> dict[int, DrawnToken]:
    """The tokens of rows that asked for log-probabilities, by row."""
    asking = [index for index, row in enumerate(rows) if row.sampling.logprobs >= 0 and is_sound[index]]
    if not asking:
        return {}
    log_p = logits[asking].log_softmax(dim=1)
    result = {}
    for place, index in enumerate(asking):
        top = _top(log_p[place], rows[index].sampling.logprobs)
        result[index] = DrawnToken(chosen[index], float(log_p[place, chosen[index]]), top)
    return result


def _top(log_p: Tensor, count: int) -> tuple[TokenLogprob, ...]:
    """The `count` most likely tokens of one row [V], best first."""
    if count == 0:
        return ()
    values, ids = torch.topk(log_p, min(count, log_p.shape[0]))
    return tuple(TokenLogprob(token_id, value) for token_id, value in zip(ids.tolist(), values.tolist(), strict=True))
