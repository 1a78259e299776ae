"""The engine as one object: arrivals in, steps run, events out. The process loop drives it; a benchmark can as well."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from node.adapters.pinned import pinned_beside
from node.adapters.pool import AdapterPool
from node.config import AdapterSettings, EngineSettings, ModelSettings
from node.engine.blocks import BlockPool
from node.engine.device import choose_device, compiled_beside, device_memory, open_kernels, open_runner
from node.engine.grammar_masks import GrammarMasks
from node.engine.memory import open_memory
from node.engine.messages import Ready, SequenceEvent, Stats, Submit
from node.engine.opening import describe_engine, open_grammars, read_source, scheduler_limits
from node.engine.runner import LogitsWatcher
from node.engine.scheduler import Scheduler
from node.engine.sizing import memory_sizes, step_sizes
from node.engine.step_plan import StepPlan, Work, WorkResult
from node.models.base_identity import BegunBase
from node.models.load import DTYPES, ModelSource, loading
from node.request import AdapterTerm
from node.start_notes import Note, no_notes

# What torch, numpy and the kernels' own checks raise when the numbers of a step make no sense or do not fit into memory.
STEP_ERRORS = (RuntimeError, LookupError, ValueError, ArithmeticError, MemoryError)
FAILED_STEPS_LIMIT = 3  # in a row, with no sequence computed: then it is the engine and not who asks

logger = logging.getLogger(__name__)


class StepRunner(Protocol):
    """One device's arithmetic, in three parts, so that a step can be launched before the one before it has landed.

    Attributes:
        is_ahead: Whether `launch` returns before the device is done. If not, every step is collected at once.
    """

    is_ahead: bool

    def launch(self, work: list[Work]) -> Any:
        """Start the forward pass; returns the flight. Tokens that the step before draws may be unknown to the host yet."""
        ...

    def draw(self, flight: Any) -> None:
        """Start drawing its tokens. All tokens before them are known now."""
        ...

    def collect(self, flight: Any) -> list[WorkResult]:
        """Wait for the flight; returns one result per work, in order."""
        ...


@dataclass(slots=True)
class _Open:
    """A plan that the scheduler has not heard of again. `flight` is None when launching it failed."""

    plan: StepPlan
    flight: Any | None


class Engine:
    """Scheduler, runner and adapter memory of one model. Everything happens on the caller's thread, the adapter loader apart.

    Args:
        scheduler: Decides. runner: computes. adapters: the memory both ask.
        blocks: The scheduler's block pool, for the gauges.
        grammars: What answers must follow; the runner asks it for masks.
        ready: What this engine is.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        adapters: AdapterPool,
        blocks: BlockPool,
        grammars: GrammarMasks,
        ready: Ready,
    ) -> None:
        self.ready = ready
        self._grammars = grammars
        self._scheduler = scheduler
        self._runner = runner
        self._adapters = adapters
        self._blocks = blocks
        self._open: _Open | None = None
        self._failed_steps = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs, a step is still open, or an adapter is to come or go."""
        return self._scheduler.has_work or self._open is not None or self._grammars.waiting_count > 0 or self._adapters.has_wishes

    @property
    def is_copying(self) -> bool:
        """Whether adapters are on their way to a device: nothing wakes whoever waits for one."""
        return self._adapters.is_copying

    def add(self, submit: Submit) -> list[SequenceEvent]:
        """Queue a sequence, once its grammar is compiled where it has one; the event, if any, says why not."""
        return self._queue(submit) if self._grammars.admit(submit) else []

    def _queue(self, submit: Submit) -> list[SequenceEvent]:
        refusal = self._scheduler.add(submit)
        if refusal is None:
            return []
        self._grammars.forget(submit.sequence_id)
        return [refusal]

    def cancel(self, sequence_id: str) -> list[SequenceEvent]:
        """Stop a sequence; unknown ids are ignored."""
        if self._grammars.forget(sequence_id):
            return [SequenceEvent(sequence_id=sequence_id, finish_reason="cancelled")]
        event = self._scheduler.cancel(sequence_id)
        return [] if event is None else [event]

    def cancel_all(self) -> list[SequenceEvent]:
        """Stop every sequence."""
        waiting = [event for sequence_id in self._grammars.waiting_ids() for event in self.cancel(sequence_id)]
        return [*waiting, *self._scheduler.cancel_all()]

    def prefetch(self, term: AdapterTerm) -> None:
        """Bring an adapter into memory ahead of its first request."""
        self._adapters.prefetch(term)

    def evict(self, adapter_id: str) -> None:
        """Let an adapter's memory go once no sequence runs with it."""
        self._adapters.dismiss(adapter_id)

    def step(self) -> tuple[list[SequenceEvent], bool]:
        """Start a step and finish one: the same on a CPU, the one before it where the runner works ahead.

        While the device computes step A, the host plans B and launches its forward pass, takes A's tokens when they are there,
        and only then starts B's draws, whose masks and penalties may depend on them.

        Returns:
            The finished step's events, and whether any row was computed (if not, adapters are on their way).
        """
        compiled = self._take_compiled()
        plan = self._scheduler.plan()
        before, self._open = self._open, None
        is_device_idle = self._runner.is_ahead and before is None
        if not is_device_idle:
            self._look_ahead()
        current = self._launch(plan) if plan.work else None
        if is_device_idle:
            self._look_ahead()
        self._grammars.observe(plan.events)
        events = [*compiled, *plan.events, *self._land(before, current)]
        if current is not None:
            self._draw(current)
            events.extend(self._drop_failed())
            if self._runner.is_ahead and current.flight is not None:
                self._open = current
            else:
                events.extend(self._land(current, None))
        return events, before is not None or current is not None

    def _look_ahead(self) -> None:
        """What others will need: behind the step that runs, where one does."""
        self._scheduler.look_ahead()
        self._adapters.grant_wishes()  # last, so that nothing that is wanted leaves for them

    def _take_compiled(self) -> list[SequenceEvent]:
        """Queue the sequences whose grammar is ready now; returns the events of those that cannot run."""
        if not self._grammars.waiting_count:
            return []
        ready, events = self._grammars.take_compiled()
        return [*events, *(event for submit in ready for event in self._queue(submit))]

    def _drop_failed(self) -> list[SequenceEvent]:
        """End the sequences whose grammar went wrong, before what was drawn for them can be taken over."""
        events = self._grammars.take_failed()
        for event in events:
            self._scheduler.cancel(event.sequence_id)
        return events

    def _launch(self, plan: StepPlan) -> _Open:
        try:
            return _Open(plan, self._runner.launch(plan.work))
        except STEP_ERRORS:
            logger.exception("a step of %d sequences could not be launched", len(plan.work))
            return _Open(plan, None)

    def _draw(self, step: _Open) -> None:
        if step.flight is None:
            return
        try:
            self._runner.draw(step.flight)
        except STEP_ERRORS:
            logger.exception("a step of %d sequences could not draw its tokens", len(step.plan.work))
            step.flight = None

    def _land(self, step: _Open | None, following: _Open | None) -> list[SequenceEvent]:
        """Finish a step. When it failed, the one that was launched behind it with its tokens is worth nothing either."""
        if step is None:
            return []
        results = self._collect(step)
        if results is None:
            results = self._compute_alone(step.plan.work)
            if following is not None:
                following.flight = None
        else:
            self._failed_steps = 0
        events = [*self._settle(step.plan), *self._scheduler.complete(step.plan, results)]
        self._grammars.observe(events)
        return events

    def _settle(self, plan: StepPlan) -> list[SequenceEvent]:
        """End whoever was computed with an adapter that is not what its hash says, before anything of it leaves."""
        if not self._adapters.has_trials:
            return []
        named = {term.adapter_id for work in plan.work for term in work.sequence.terms}
        return self._scheduler.refuse(self._adapters.settle(named))

    def _collect(self, step: _Open) -> list[WorkResult] | None:
        if step.flight is None:
            return None
        try:
            return self._runner.collect(step.flight)
        except STEP_ERRORS:
            logger.exception("a step of %d sequences failed", len(step.plan.work))
            return None

    def _compute_alone(self, work: list[Work]) -> list[WorkResult]:
        """Repeat a step sequence by sequence, so that whoever makes it fail does so alone.

        Repeating is safe: the scheduler has taken over nothing yet, keys and values are written where they were, and the noise
        of a draw is a function of its position.

        Raises:
            RuntimeError: Nothing at all could be computed, `FAILED_STEPS_LIMIT` steps in a row.
        """
        logger.warning("repeating a step of %d sequences one by one", len(work))
        results = [self._compute_one(item) for item in work]
        if not all(result.has_failed or result.is_skipped for result in results):
            self._failed_steps = 0
            return results
        self._failed_steps += 1
        if self._failed_steps >= FAILED_STEPS_LIMIT:
            raise RuntimeError(f"{self._failed_steps} steps in a row computed nothing; the log says why")
        return results

    def _compute_one(self, work: Work) -> WorkResult:
        if not self._scheduler.can_repeat(work):
            return WorkResult(is_skipped=True)
        try:
            flight = self._runner.launch([work])
            self._runner.draw(flight)
            return self._runner.collect(flight)[0]
        except STEP_ERRORS:
            logger.exception("sequence %s failed by itself", work.sequence.id)
            return WorkResult(has_failed=True)

    def stats(self) -> Stats:
        """Counters and gauges of this moment."""
        counters, adapters = self._scheduler.counters, self._adapters
        return Stats(
            running=self._scheduler.running_count,
            waiting=self._scheduler.waiting_count,
            kv_blocks_used=self._blocks.used_count,
            kv_blocks_total=self._blocks.block_count,
            resident_adapters=adapters.resident_ids,
            host_adapters=adapters.host_ids,
            waiting_adapters=self._scheduler.waiting_adapters(),
            adapter_slots=adapters.slot_count,
            steps_total=counters.steps,
            prompt_tokens_total=counters.prompt_tokens,
            cached_prompt_tokens_total=counters.cached_prompt_tokens,
            output_tokens_total=counters.output_tokens,
            preemptions_total=counters.preemptions,
            adapter_loads_total=adapters.loads_total,
            adapter_evictions_total=adapters.evictions_total,
            adapter_file_loads_total=adapters.file_loads_total,
            adapter_host_evictions_total=adapters.host_evictions_total,
            adapter_sent_bytes_total=adapters.sent_bytes_total,
            adapter_load_seconds_total=adapters.load_seconds_total,
            max_adapters_in_one_step=counters.max_adapters_in_one_step,
            last_step_adapters=counters.last_step_adapters,
        )

    def close(self) -> None:
        """End the loader's and the compiler's thread."""
        self._adapters.close()
        self._grammars.close()


def open_engine(
    model_settings: ModelSettings,
    settings: EngineSettings,
    adapter_settings: AdapterSettings,
    state_dir: Path,
    wake: Callable[[], None] = lambda: None,
    watch_logits: LogitsWatcher | None = None,
    source: ModelSource | None = None,
    base: BegunBase | None = None,
    note: Note = no_notes,
) -> Engine:
    """Load the model and build everything around it. Sets this process's number of compute threads.

    Args:
        state_dir: Tokenizer files and the cache of content hashes go here.
        wake: Called from the loader thread when an adapter changed its state.
        watch_logits: See `Runner`.
        source: A model that is not in files, for benchmarks; None reads what the settings name.
        base: From `begin_base`, where that came first.
        note: Called with what is done, one by one.

    Raises:
        ModelLoadError, ConfigError: The settings name something this machine cannot run.
    """
    device = choose_device(model_settings.device)
    sizes = step_sizes(settings, adapter_settings, "cpu" if device.type == "cpu" else "cuda")
    dtype = DTYPES[model_settings.dtype]
    if source is None:
        source = read_source(model_settings, state_dir, base)
    spec = source.spec
    kernels = open_kernels(device, settings, sizes, spec, dtype)
    note("kernels opened")
    with (
        compiled_beside(device, spec.vocab_size) as wait_for_sampler,
        pinned_beside() as allocate_host,
        loading(source, dtype, kernels, sizes.page_rank) as loaded,
    ):
        memory = memory_sizes(settings, adapter_settings, *device_memory(device, spec, sizes, dtype))
        held = open_memory(loaded, settings, adapter_settings, memory, sizes.kv_block_size, device, wake, allocate_host)
        note("memory opened")
        longest = held.longest(spec.max_model_len)
        tokenizer_dir = source.write_tokenizer(state_dir / "tokenizer")
        grammars = open_grammars(tokenizer_dir, spec, device, wake)
        runner = open_runner(loaded, kernels, held.kv, held.adapters, grammars, sizes, longest, watch_logits, wait_for_sampler)
        note("steps prepared")
    note("weights there")
    limits = scheduler_limits(sizes, settings.queue_limit, longest, spec.vocab_size)
    ready = describe_engine(model_settings, adapter_settings, source, loaded, held, device, kernels.name, tokenizer_dir, longest)
    scheduler = Scheduler(held.blocks, limits, held.adapters, loaded.base_id)
    return Engine(scheduler, runner, held.adapters, held.blocks, grammars, ready)
