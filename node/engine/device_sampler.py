"""The next tokens of a step on the device that computed its logits: nothing waits for the device until somebody reads.

The same definitions as `node.engine.sampler` (noise of one number a row, order of the filters, lowest index among equals). On a
GPU the greedy choice is one kernel that belongs into the step's graph and leaves everything where the next step and the host look
for it, so that nothing else runs between two steps; rows that ask for more cost a few launches after it. What the host wants to
know is copied to pinned memory beside the next step.

Shape letters: W rows that want logits, n rows that ask for more than the argmax, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from node.engine.device_shift import forbid_rows, shift, to_device
from node.engine.grammar import mask_width
from node.engine.noise import uniforms
from node.engine.sampler import DrawRow, RowMask, draw_random, is_plain, is_shifted
from node.kernels.head_rows import LogitTops
from node.request import DrawnToken, Sampling, TokenLogprob

_PARTS = 8  # programs that share a row of the greedy kernel: 64 rows then fill the GPU four times over
_GREEDY_BLOCK = 2048
_DRAW_BLOCK = 4096
_DRAW_WARPS = 32
_LOW_64 = (1 << 64) - 1
_UNSOUND = -1  # in place of the token of a row whose logits are not finite


@dataclass(slots=True)
class Choice:
    """Where the tokens of a step go; made once, and static under a CUDA graph.

    Attributes:
        tokens: [W] int32, for the next step. Always tokens of the vocabulary, so that it can embed them.
        answers: [turns, W] int32, for the host, which may read those of one step while the next one writes: the token, or -1
            where the logits are not finite.
        turn: [1] int32. Which row of `answers` the step writes.
        copied: Of every turn the event behind the last copy to the host.
    """

    tokens: Tensor
    answers: Tensor
    turn: Tensor
    copied: list[Any]

    @classmethod
    def of(cls, tokens: Tensor, turn: Tensor, turns: int) -> Choice:
        """Choices that are left in `tokens`."""
        answers = torch.zeros((turns, tokens.shape[0]), dtype=torch.int32, device=tokens.device)
        return cls(tokens, answers, turn, [None] * turns)

    def claim(self, turn: int) -> None:
        """Before the step that writes there is launched."""
        event = self.copied[turn]
        if event is not None and not event.query():
            torch.cuda.current_stream().wait_event(event)

    def step(self, turn: int) -> Chosen:
        """What the step of this turn leaves, in stream order."""
        return Chosen(self.tokens, self.answers[turn], self.copied, turn)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A step's own part of a `Choice`. tokens, answers: [W] int32."""

    tokens: Tensor
    answers: Tensor
    copied: list[Any]
    turn: int

    def put(self, where: Tensor, tokens: Tensor) -> None:
        """Other tokens [n] for the rows `where` [n]; what is not sound stays so."""
        tokens = tokens.to(torch.int32)
        self.tokens[where] = tokens
        answers = self.answers[where]
        self.answers[where] = torch.where(answers < 0, answers, tokens)


@dataclass(slots=True)
class _Logprobs:
    """Rows that asked for log-probabilities, [m] of the chosen token and [m, k] of the most likely ones."""

    rows: list[int]
    chosen: Tensor
    top_values: Tensor
    top_ids: Tensor


class DeviceDraw:
    """The tokens of one step, on their way to the host.

    Args:
        stream: Where they are copied while the next step computes; None on a CPU.
    """

    def __init__(self, chosen: Chosen, rows: Sequence[DrawRow], logprobs: _Logprobs | None, stream: Any = None) -> None:
        self._rows = rows
        self._logprobs = logprobs
        if logprobs is not None:
            logprobs.chosen = _to_host(logprobs.chosen)
            logprobs.top_values, logprobs.top_ids = _to_host(logprobs.top_values), _to_host(logprobs.top_ids)
        answers = chosen.answers[: len(rows)]
        self._event: torch.cuda.Event | None = None
        if stream is None:
            self._answers = _to_host(answers)
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._answers = _to_host(answers)
            self._event = chosen.copied[chosen.turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(stream)

    def read(self) -> list[DrawnToken | None]:
        """Wait for the device and return one token a row; None where the logits were not finite."""
        if self._event is not None:
            self._event.synchronize()
        drawn: list[DrawnToken | None] = [DrawnToken(token) if token != _UNSOUND else None for token in self._answers.tolist()]
        if self._logprobs is not None:
            self._add_logprobs(drawn, self._logprobs)
        return drawn

    def _add_logprobs(self, drawn: list[DrawnToken | None], found: _Logprobs) -> None:
        chosen, values, ids = found.chosen.tolist(), found.top_values.tolist(), found.top_ids.tolist()
        for place, row in enumerate(found.rows):
            token = drawn[row]
            if token is not None:
                count = self._rows[row].sampling.logprobs
                top = zip(ids[place][:count], values[place][:count], strict=True)
                drawn[row] = DrawnToken(token.token_id, chosen[place], tuple(TokenLogprob(*pair) for pair in top))


class DeviceSampler:
    """Draws the next tokens of a step's rows. One a device; every call runs on torch's current stream.

    Args:
        vocab_size: V. max_rows: the most rows of one step.
        device: of the logits. On a CPU everything is done at once, by the code of `node.engine.sampler`.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self._vocab = vocab_size
        self._device = device
        self._has_dependents = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._spans = 1 << (-(-vocab_size // _DRAW_BLOCK) - 1).bit_length()
        self._to_host: Any = None
        if device.type == "cuda":
            self._to_host = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._part_values = torch.empty((max_rows, _PARTS), dtype=torch.float32, device=device)
            self._part_tokens = torch.empty((max_rows, _PARTS), dtype=torch.int32, device=device)
            self._arrived = torch.zeros(max_rows, dtype=torch.int32, device=device)

    def new_choice(self, rows: int) -> Choice:
        """For steps of at most `rows`, all of one turn."""
        zeros = torch.zeros(rows + 1, dtype=torch.int32, device=self._device)
        return Choice.of(zeros[:rows], zeros[rows:], turns=1)

    def warm_up(self) -> None:
        """Compile what the first row that no recorded step draws for would otherwise keep every other row waiting for."""
        if self._device.type != "cuda":
            return
        choice = self.new_choice(1)
        self.greedy(torch.zeros((1, self._vocab), device=self._device), choice)
        words = torch.full((1, mask_width(self._vocab)), -1, dtype=torch.int32, device=self._device)
        for temperature in (0.0, 1.0):
            row = DrawRow(Sampling(max_new_tokens=1, temperature=temperature), 0, array("q", [0]), 1)
            for mask in (None, RowMask([0], words)):
                self.draw(torch.zeros((1, self._vocab), device=self._device), [row], choice.step(0), mask).read()

    def greedy(self, logits: Tensor, choice: Choice, tops: LogitTops | None = None, *, use_pdl: bool = False) -> None:
        """Choose the largest logit of every row, the lowest index among equals. Safe inside a CUDA graph.

        Args:
            logits: [W, V] float32, contiguous rows. choice: of at least W rows, written.
            tops: Of these logits; they are then not read, where the largest are there.
            use_pdl: launch with programmatic stream serialization (compute capability 9.0 on).
        """
        count = logits.shape[0]
        parts = None if tops is None else tops.parts
        if logits.is_cuda and parts is not None:
            self._launch_top(parts, choice)
            return
        if logits.is_cuda:
            self._launch_greedy(logits, choice.tokens, choice.answers, choice.turn, use_pdl=use_pdl)
            return
        tokens, is_sound = _largest(logits) if parts is None else _sound(*join_parts(parts))
        choice.tokens[:count] = tokens
        choice.answers[int(choice.turn), :count] = torch.where(is_sound, tokens, _UNSOUND).to(torch.int32)

    def _launch_greedy(
        self,
        logits: Tensor,
        tokens: Tensor,
        answers: Tensor,
        turn: Tensor | None,
        where: Tensor | None = None,
        *,
        use_pdl: bool = False,
    ) -> None:
        """Of all rows, for the turn that the device knows; or once more of those in `where`, whose turn's `answers` are given."""
        from node.kernels.triton_sampling import greedy_kernel

        pdl = {"launch_pdl": True} if use_pdl else {}
        count = logits.shape[0] if where is None else where.shape[0]
        greedy_kernel[(count, _PARTS)](
            logits, tokens, answers, turn, where, self._part_values, self._part_tokens, self._arrived,
            self._vocab, logits.stride(0), answers.stride(0),
            PARTS=_PARTS, BLOCK=_GREEDY_BLOCK, IS_AGAIN=where is not None, USE_PDL=use_pdl, num_warps=8, **pdl,
        )  # fmt: skip

    def _launch_top(self, parts: Tensor, choice: Choice) -> None:
        from node.kernels.triton_sampling import top_kernel

        count = parts.shape[1]
        pdl = {"launch_pdl": True} if self._has_dependents else {}
        top_kernel[(parts.shape[0],)](
            parts, choice.tokens, choice.answers, choice.turn, count, choice.answers.stride(0),
            PARTS=1 << (count - 1).bit_length(), USE_PDL=self._has_dependents, num_warps=1, **pdl,
        )  # fmt: skip

    def draw(
        self,
        logits: Tensor,
        rows: Sequence[DrawRow],
        chosen: Chosen,
        mask: RowMask | None = None,
        unseen: Tensor | None = None,
    ) -> DeviceDraw:
        """Draw for the rows that ask for more than `greedy` chose, and send everything to the host.

        Args:
            logits: [W, V] float32, those that `greedy` filled `chosen` from; only rows that `reads_logits` are read. Rows
                that are greedy but for penalties, a bias or a mask, and want no log-probabilities, are changed in place.
            rows: W of them; their `tokens` are what the host knows.
            chosen: read, and overwritten for the rows that ask for more.
            mask: Tokens allowed, words on this device or in memory that it reads while the host goes on; None allows all.
            unseen: [W] int64 on this device: the token of the step before, which the host has not read yet and `rows` therefore
                lack; None when they lack nothing.

        Returns:
            What `read` waits for. Log-probabilities are those of the unmasked, unmodified distribution.
        """
        masked = set(mask.rows) if mask is not None else set()
        if mask is not None:
            mask = RowMask(mask.rows, mask.words.to(self._device, non_blocking=True))
        again = [index for index, row in enumerate(rows) if _is_greedy_again(row.sampling, is_masked=index in masked)]
        if again:
            self._choose_again(logits, [rows[index] for index in again], again, chosen, mask, unseen)
        plain = {*again, *(index for index, row in enumerate(rows) if is_plain(row.sampling) and index not in masked)}
        special = [index for index in range(len(rows)) if index not in plain]
        if special:
            held = mask if masked.intersection(special) else None
            self._draw_special(logits, [rows[index] for index in special], special, chosen, held, unseen)
        return DeviceDraw(chosen, rows, _logprobs(logits, rows, chosen), self._to_host)

    def _choose_again(
        self,
        logits: Tensor,
        rows: list[DrawRow],
        indexes: list[int],
        chosen: Chosen,
        mask: RowMask | None,
        unseen: Tensor | None,
    ) -> None:
        """The greedy choice of rows that penalties, a bias or a mask change: no row is copied, or searched more than once."""
        where = to_device(np.array(indexes, dtype=np.int64), self._device)
        shift(logits, rows, None if unseen is None else unseen[where], indexes)
        if mask is not None:
            forbid_rows(logits, mask, indexes, indexes)
        if logits.is_cuda:
            self._launch_greedy(logits, chosen.tokens, chosen.answers, None, where)
        else:
            chosen.put(where, _largest(logits[where])[0])

    def _draw_special(
        self,
        logits: Tensor,
        rows: list[DrawRow],
        indexes: list[int],
        chosen: Chosen,
        mask: RowMask | None,
        unseen: Tensor | None,
    ) -> None:
        where = to_device(np.array(indexes, dtype=np.int64), self._device)
        is_changed = mask is not None or any(is_shifted(row.sampling) for row in rows)
        if logits.is_cuda and not is_changed:
            self._launch_draw(logits, rows, where, chosen, int(unseen is not None), in_place=True)
            return
        x = logits[where]  # a copy
        shift(x, rows, None if unseen is None else unseen[where])
        if mask is not None:
            forbid_rows(x, mask, indexes)
        if x.is_cuda:
            self._launch_draw(x, rows, where, chosen, int(unseen is not None), in_place=False)
        else:
            tokens = x.argmax(dim=1)
            random = [place for place, row in enumerate(rows) if row.sampling.temperature > 0]
            if random:
                is_finite = x[random].amax(dim=1, keepdim=True).isfinite()  # rows that are not sound must still not raise
                drawn = draw_random(x[random].where(is_finite, 0.0), [rows[place] for place in random], int(unseen is not None))
                tokens[random] = torch.tensor(drawn)
            chosen.put(where, tokens)

    def _launch_draw(self, x: Tensor, rows: list[DrawRow], where: Tensor, chosen: Chosen, ahead: int, *, in_place: bool) -> None:
        from node.kernels.triton_sampling import draw_kernel

        asked = to_device(_asked(rows, ahead), self._device)
        draw_kernel[(len(rows),)](
            x, asked, where, chosen.tokens, chosen.answers, self._vocab, x.stride(0), IN_PLACE=in_place, ANY_KEY=0x7FFFFFFF,
            TINY=torch.finfo(torch.float32).tiny, SPANS=self._spans, BLOCK=_DRAW_BLOCK, num_warps=_DRAW_WARPS,
        )  # fmt: skip


def join_parts(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value [W] (NaN where one is) and its lowest token [W] of `LogitTops.parts`."""
    values, tokens = parts[..., 0].contiguous().view(torch.float32), parts[..., 1]
    best = values.amax(dim=1)
    return best, tokens.where(values == best[:, None], torch.iinfo(torch.int32).max).amin(dim=1).long()


def _sound(best: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of the largest logits `best`, 0 where those are not finite, and whether they are."""
    is_sound = best.isfinite()
    return torch.where(is_sound, tokens, 0), is_sound


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The token of each row's largest logit, the lowest among equals, as `_sound`."""
    best = logits.max(dim=1)  # NaN where one is
    return _sound(best.values, best.indices)


def reads_logits(sampling: Sampling, *, has_grammar: bool) -> bool:
    """Whether drawing a row may take more than the largest of its logits."""
    return has_grammar or sampling.logprobs >= 0 or not is_plain(sampling)


def _is_greedy_again(sampling: Sampling, *, is_masked: bool) -> bool:
    """Greedy after a mask, or after penalties or a bias that touch few tokens, with nothing else wanted of the row."""
    counts_tokens = sampling.frequency_penalty != 0 or sampling.presence_penalty != 0  # in memory as large as the logits
    is_changed = is_masked or is_shifted(sampling)
    return sampling.temperature == 0 and sampling.logprobs < 0 and is_changed and not counts_tokens


def _asked(rows: Sequence[DrawRow], ahead: int) -> npt.NDArray[np.float64]:
    """[n, 6] parameters of `draw_kernel`. Greedy is temperature 0 without filters and without noise."""
    samplings = [row.sampling for row in rows]
    asked = np.array([(s.temperature, s.top_k, s.typical_p, s.top_p, s.min_p, 0.0) for s in samplings], dtype=np.float64)
    seeds = np.array([s.seed & _LOW_64 for s in samplings], dtype=np.uint64)
    positions = np.array([len(row.tokens) + ahead for row in rows], dtype=np.uint64)
    asked[:, 5] = uniforms(seeds, [row.choice_index for row in rows], positions)
    asked[asked[:, 0] == 0] = (0.0, 0.0, 1.0, 1.0, 0.0, 0.0)
    return asked


def _logprobs(logits: Tensor, rows: Sequence[DrawRow], chosen: Chosen) -> _Logprobs | None:
    asking = [index for index, row in enumerate(rows) if row.sampling.logprobs >= 0]
    if not asking:
        return None
    where = to_device(np.array(asking, dtype=np.int64), logits.device)
    log_p = logits[where].log_softmax(dim=1)
    most = min(max(rows[index].sampling.logprobs for index in asking), logits.shape[1])
    top = torch.topk(log_p, most, dim=1)
    of_chosen = log_p.gather(1, chosen.tokens[where].long()[:, None])[:, 0]
    return _Logprobs(asking, of_chosen, top.values, top.indices)


def _to_host(values: Tensor) -> Tensor:
    """A copy on the host that is complete once an event recorded after this call has passed."""
    if not values.is_cuda:
        return values.clone()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
