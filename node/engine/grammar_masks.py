"""The grammars of the sequences in flight: compiled on a thread, advanced by every drawn token, asked for masks before a draw.

Nothing is ever rolled back: a matcher advances only when its sequence has taken the token over, so a step that is repeated, a
sequence that is preempted and computed again, and a draw that never happened all find it where it was.

Shape letters: W rows that draw a token, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher

from node.engine.grammar import MaskFiller, Vocabulary
from node.engine.grammar_cache import GrammarCache
from node.engine.messages import SequenceEvent, Submit
from node.errors import GrammarError

_ALL_ALLOWED = -1
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Constraint:
    """A sequence's own matcher. `failure` is set once it can go on no more."""

    tenant: str
    text: str
    matcher: LLMatcher
    failure: GrammarError | None = None


class GrammarMasks:
    """Which tokens each sequence may draw next. All methods are for the step loop's thread.

    Args:
        open_vocabulary: Makes the vocabulary. Called once and at once, on this object's own thread: it takes a quarter of a
            second and holds the interpreter lock, which nobody minds while the engine opens.
        wake: Called from that thread when a grammar is ready; compiling one releases the lock.
        fill_threads: Threads that write the masks of a step.
    """

    def __init__(self, open_vocabulary: Callable[[], Vocabulary], wake: Callable[[], None], fill_threads: int = 1) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._wake = wake
        self._filler = MaskFiller(fill_threads)
        self._vocabulary: Future[Vocabulary] = self._executor.submit(open_vocabulary)
        self._compiled: GrammarCache[LLMatcher] = GrammarCache()
        self._waiting: dict[str, tuple[Submit, Future[LLMatcher]]] = {}
        self._constraints: dict[str, _Constraint] = {}
        self._failed: set[str] = set()

    def close(self) -> None:
        """End the thread; what waits for it is never compiled."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    # ---- arrivals

    @property
    def waiting_count(self) -> int:
        """Sequences whose grammar is still being compiled."""
        return len(self._waiting)

    def admit(self, submit: Submit) -> bool:
        """Whether `submit` may be queued now. If not, its grammar is compiled first and `take_compiled` returns it later."""
        text = submit.grammar
        if text is None:
            return True
        matcher = self._compiled.get(submit.tenant, text)
        if matcher is not None:
            self._attach(submit, text, matcher)
            return True
        if submit.sequence_id not in self._waiting:
            future = self._executor.submit(self._compile, text)
            future.add_done_callback(lambda _: self._wake())
            self._waiting[submit.sequence_id] = (submit, future)
        return False

    def take_compiled(self) -> tuple[list[Submit], list[SequenceEvent]]:
        """Sequences that may be queued now, and the last events of those whose grammar does not compile."""
        ready: list[Submit] = []
        refused: list[SequenceEvent] = []
        for sequence_id, (submit, future) in list(self._waiting.items()):
            if not future.done():
                continue
            del self._waiting[sequence_id]
            error = future.exception()
            if error is None:
                self._compiled.put(submit.tenant, submit.grammar or "", future.result())
                self._attach(submit, submit.grammar or "", future.result())
                ready.append(submit)
            else:
                refused.append(_last_event(sequence_id, _as_grammar_error(error)))
        return ready, refused

    def forget(self, sequence_id: str) -> bool:
        """Drop a sequence that is over. Returns whether it was still waiting for its grammar."""
        self._constraints.pop(sequence_id, None)
        self._failed.discard(sequence_id)
        waiting = self._waiting.pop(sequence_id, None)
        if waiting is not None:
            waiting[1].cancel()
        return waiting is not None

    def waiting_ids(self) -> list[str]:
        """Ids of the sequences whose grammar is still being compiled."""
        return list(self._waiting)

    def _compile(self, text: str) -> LLMatcher:
        return self._vocabulary.result().compile(text)

    def _attach(self, submit: Submit, text: str, template: LLMatcher) -> None:
        # A copy has a place of its own and shares the automaton, which grows with what any copy meets.
        self._constraints[submit.sequence_id] = _Constraint(submit.tenant, text, template.deep_copy())

    # ---- steps

    @property
    def is_idle(self) -> bool:
        """Whether no sequence has a grammar."""
        return not self._constraints

    def constrained(self, sequence_ids: Sequence[str]) -> list[int]:
        """The rows that have a grammar."""
        return [index for index, sequence_id in enumerate(sequence_ids) if sequence_id in self._constraints]

    def allows(self, sequence_id: str, token_id: int) -> bool:
        """Whether a sequence with a grammar may draw a token: a hundredth of a mask's time, for rows that know what they want."""
        constraint = self._constraints[sequence_id]
        matcher = constraint.matcher
        if constraint.failure is not None:
            return True
        forced = matcher.compute_ff_tokens()
        if forced:  # text that must come is written in the tokens that the tokenizer would give it, as the mask has it
            return bool(token_id == forced[0])
        if matcher.validate_tokens([token_id]) == 1:
            return True
        if matcher.is_stopped() and not matcher.is_error():
            return token_id in self._vocabulary.result().end_ids
        return False

    def fill_mask(self, sequence_ids: Sequence[str], buffer: np.ndarray) -> list[int]:
        """Write the tokens that each row may draw, from the tokens its sequence has taken over so far.

        Args:
            sequence_ids: W of them, one a row.
            buffer: [at least W, ceil(V / 32)] int32, rows contiguous, overwritten: bit i of word w allows token 32 w + i. Rows
                without a grammar allow everything.

        Returns:
            The rows that have a grammar; with none of them the buffer is untouched.
        """
        rows = self.constrained(sequence_ids)
        if not rows:
            return rows
        buffer[: len(sequence_ids)] = _ALL_ALLOWED
        asked = [(self._constraints[sequence_ids[index]], index) for index in rows]
        self._filler.fill([(constraint.matcher, index) for constraint, index in asked if constraint.failure is None], buffer)
        for constraint, index in asked:
            if constraint.failure is None and (constraint.matcher.is_error() or not buffer[index].any()):
                self._fail(sequence_ids[index], constraint)
            if constraint.failure is not None:
                buffer[index] = _ALL_ALLOWED  # what is drawn is thrown away; the other rows must not suffer
        return rows

    def advance(self, sequence_id: str, token_id: int) -> None:
        """A sequence has taken a token over."""
        constraint = self._constraints.get(sequence_id)
        if constraint is not None and constraint.failure is None and not constraint.matcher.consume_token(token_id):
            self._fail(sequence_id, constraint)

    def observe(self, events: Sequence[SequenceEvent]) -> None:
        """Advance by the tokens of a step's events and drop the sequences that ended with them."""
        if not self._constraints:
            return
        for event in events:
            if event.finish_reason is not None:
                self.forget(event.sequence_id)
                continue
            for token in event.tokens:
                self.advance(event.sequence_id, token.token_id)

    def take_failed(self) -> list[SequenceEvent]:
        """The last events of sequences whose grammar can go on no more; the caller takes them off the scheduler."""
        events = []
        for sequence_id in sorted(self._failed):
            failure = self._constraints[sequence_id].failure
            if failure is not None:
                events.append(_last_event(sequence_id, failure))
            self.forget(sequence_id)
        self._failed.clear()
        return events

    def _fail(self, sequence_id: str, constraint: _Constraint) -> None:
        logger.warning("the grammar of sequence %s failed: %s", sequence_id, constraint.matcher.get_error()[:200])
        constraint.failure = GrammarError(
            "the grammar became too complex while the answer was made, or it led to a dead end; simplify it",
            code="schema_too_complex",
        )
        self._failed.add(sequence_id)
        # Its automaton may be full, for this sequence and for the next ones: they start with a fresh one.
        self._compiled.discard(constraint.tenant, constraint.text)


def _as_grammar_error(error: BaseException) -> GrammarError:
    if isinstance(error, GrammarError):
        return error
    logger.error("compiling a grammar failed", exc_info=error)
    return GrammarError("the grammar could not be compiled; simplify it", code="schema_too_complex")


def _last_event(sequence_id: str, error: GrammarError) -> SequenceEvent:
    return SequenceEvent(sequence_id=sequence_id, finish_reason="error", error_code=error.error_code, error_message=error.message)
