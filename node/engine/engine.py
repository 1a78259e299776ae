"""The engine as one object: arrivals in, steps run, events out. The process loop drives it; a benchmark can as well."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from node.adapters.binding import LinearTable
from node.adapters.loader import AdapterLoader
from node.adapters.pool import AdapterPool
from node.config import AdapterSettings, EngineSettings, ModelSettings
from node.engine.blocks import BlockPool
from node.engine.messages import Ready, SequenceEvent, Stats, Submit
from node.engine.runner import LogitsWatcher, Runner
from node.engine.scheduler import Scheduler, SchedulerLimits, Work, WorkResult
from node.kernels.ops import Kernels
from node.models.load import DTYPES, load_model, make_kv_cache
from node.models.source import resolve
from node.models.tokenizer_files import write_tokenizer

# What torch, numpy and the kernels' own checks raise when the numbers of a step make no sense or do not fit into memory.
STEP_ERRORS = (RuntimeError, LookupError, ValueError, ArithmeticError, MemoryError)
FAILED_STEPS_LIMIT = 3  # in a row, with no sequence computed: then it is the engine and not who asks

logger = logging.getLogger(__name__)


class Engine:
    """Scheduler, runner and adapter memory of one model. Everything happens on the caller's thread, the adapter loader apart.

    Args:
        scheduler: Decides. runner: computes. adapters: the memory both ask.
        blocks: The scheduler's block pool, for the gauges.
        ready: What this engine is.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, adapters: AdapterPool, blocks: BlockPool, ready: Ready) -> None:
        self.ready = ready
        self._scheduler = scheduler
        self._runner = runner
        self._adapters = adapters
        self._blocks = blocks
        self._failed_steps = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return self._scheduler.has_work

    def add(self, submit: Submit) -> list[SequenceEvent]:
        """Queue a sequence; the event, if any, says why not."""
        refusal = self._scheduler.add(submit)
        return [] if refusal is None else [refusal]

    def cancel(self, sequence_id: str) -> list[SequenceEvent]:
        """Stop a sequence; unknown ids are ignored."""
        event = self._scheduler.cancel(sequence_id)
        return [] if event is None else [event]

    def cancel_all(self) -> list[SequenceEvent]:
        """Stop every sequence."""
        return self._scheduler.cancel_all()

    def step(self) -> tuple[list[SequenceEvent], bool]:
        """Run one step; returns its events, and whether any row was computed (if not, adapters are on their way)."""
        plan = self._scheduler.plan()
        if not plan.work:
            return plan.events, False
        results = self._compute(plan.work)
        return [*plan.events, *self._scheduler.complete(plan, results)], True

    def _compute(self, work: list[Work]) -> list[WorkResult]:
        """Compute a step; one that fails is repeated sequence by sequence, so that whoever makes it fail does so alone.

        Repeating is safe: the scheduler has taken over nothing yet, keys and values are written where they were, and the noise
        of a draw is a function of its position.

        Raises:
            One of STEP_ERRORS: Nothing at all could be computed, `FAILED_STEPS_LIMIT` steps in a row.
        """
        try:
            results = self._runner.step(work)
        except STEP_ERRORS:
            logger.exception("a step of %d sequences failed; repeating it one by one", len(work))
            results = [self._compute_alone(item) for item in work]
            if all(result.has_failed for result in results):
                self._failed_steps += 1
                if self._failed_steps >= FAILED_STEPS_LIMIT:
                    raise
                return results
        self._failed_steps = 0
        return results

    def _compute_alone(self, work: Work) -> WorkResult:
        try:
            return self._runner.step([work])[0]
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
            waiting_adapters=self._scheduler.waiting_adapters(),
            adapter_slots=adapters.slot_count,
            steps_total=counters.steps,
            prompt_tokens_total=counters.prompt_tokens,
            cached_prompt_tokens_total=counters.cached_prompt_tokens,
            output_tokens_total=counters.output_tokens,
            preemptions_total=counters.preemptions,
            adapter_loads_total=adapters.loads_total,
            adapter_evictions_total=adapters.evictions_total,
            adapter_load_seconds_total=adapters.load_seconds_total,
            max_adapters_in_one_step=counters.max_adapters_in_one_step,
            last_step_adapters=counters.last_step_adapters,
        )

    def close(self) -> None:
        """End the loader thread."""
        self._adapters.close()


def open_engine(
    model_settings: ModelSettings,
    settings: EngineSettings,
    adapter_settings: AdapterSettings,
    state_dir: Path,
    wake: Callable[[], None] = lambda: None,
    watch_logits: LogitsWatcher | None = None,
) -> Engine:
    """Load the model and build everything around it. Sets this process's number of compute threads.

    Args:
        state_dir: Tokenizer files and the cache of content hashes go here.
        wake: Called from the loader thread when an adapter changed its state.
        watch_logits: See `Runner`.

    Raises:
        ModelLoadError, ConfigError: The settings name something this machine cannot run.
    """
    threads = settings.threads or os.cpu_count() or 1
    kernels = Kernels.load(settings.kernels, threads=threads, is_deterministic=settings.deterministic)
    # The compiled kernels have threads of their own; torch's, once awake, would spin on the same cores for milliseconds.
    torch.set_num_threads(threads if kernels.name == "reference" else 1)
    files = resolve(model_settings.path, model_settings.revision)
    loaded = load_model(
        files,
        DTYPES[model_settings.dtype],
        kernels,
        max_model_len=model_settings.max_model_len,
        page_rank=adapter_settings.page_rank,
        hash_cache=state_dir / "model_hashes.json",
    )
    spec, dtype = loaded.spec, loaded.dtype
    kv = make_kv_cache(spec, settings.kv_cache_bytes, settings.kv_block_size, dtype)
    loader = AdapterLoader(
        loaded.layout,
        LinearTable(spec.linear_kinds),
        max_rank=adapter_settings.max_rank,
        max_bytes=adapter_settings.max_adapter_bytes,
        wake=wake,
    )
    adapters = AdapterPool(
        loaded.layout, dtype, memory_bytes=adapter_settings.memory_bytes, max_rank=adapter_settings.max_rank, loader=loader
    )
    blocks = BlockPool(kv.block_count, kv.block_size, settings.prefix_cache)
    # A sequence can never be longer than the whole cache.
    max_model_len = min(spec.max_model_len, kv.block_count * kv.block_size)
    limits = SchedulerLimits(
        settings.max_sequences, settings.max_batch_tokens, settings.queue_limit, max_model_len, spec.vocab_size
    )
    ready = Ready(
        model_id=files.model_id,
        base_id=loaded.base_id,
        architecture=spec.architecture,
        dtype=model_settings.dtype,
        device="cpu",
        kernels=kernels.name,
        vocab_size=spec.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=spec.eos_token_ids,
        tokenizer_dir=str(write_tokenizer(files, spec.eos_token_ids, state_dir / "tokenizer")),
        linears=spec.linear_kinds,
        kv_block_count=kv.block_count,
        kv_block_size=kv.block_size,
        max_rank=adapter_settings.max_rank,
    )
    scheduler = Scheduler(blocks, limits, adapters, loaded.base_id)
    return Engine(scheduler, Runner(loaded.model, kv, adapters, watch_logits), adapters, blocks, ready)
