"""What an engine is made of besides memory and device: the model's source, grammars, bounds, and what it says of itself."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

from node.config import AdapterSettings, ModelSettings
from node.engine.device import device_name
from node.engine.grammar import Vocabulary
from node.engine.grammar_masks import GrammarMasks
from node.engine.limits import SchedulerLimits
from node.engine.memory import EngineMemory
from node.engine.messages import Ready
from node.engine.sizing import StepSizes, fill_threads
from node.models.base_identity import HASH_CACHE, BegunBase, begin_base
from node.models.load import LoadedModel, ModelSource, open_source
from node.models.spec import ModelSpec


def read_source(settings: ModelSettings, state_dir: Path, base: BegunBase | None) -> ModelSource:
    """The model that the settings name, whose hash is computed beside its loading.

    Raises:
        ModelLoadError: There is none.
    """
    base = base or begin_base(settings.path, settings.revision, state_dir / HASH_CACHE)
    return open_source(base.files, settings.max_model_len, begun_hash=base.wait_for_hash)


def open_grammars(tokenizer_dir: Path, spec: ModelSpec, device: torch.device, wake: Callable[[], None]) -> GrammarMasks:
    """Grammars over the model's tokens, which are read on a thread of their own."""
    read_vocabulary = functools.partial(Vocabulary, tokenizer_dir / "tokenizer.json", spec.vocab_size, spec.eos_token_ids)
    return GrammarMasks(read_vocabulary, wake, fill_threads(device.type, os.cpu_count() or 1))


def scheduler_limits(sizes: StepSizes, queue_limit: int, max_model_len: int, vocab_size: int) -> SchedulerLimits:
    """Bounds of the scheduler. `max_model_len`: tokens, see `EngineMemory.longest`."""
    return SchedulerLimits(
        sizes.max_sequences,
        sizes.max_batch_tokens,
        queue_limit,
        max_model_len,
        vocab_size,
        spread_sizes=sizes.spread_sizes,
    )


def describe_engine(
    model_settings: ModelSettings,
    adapter_settings: AdapterSettings,
    source: ModelSource,
    loaded: LoadedModel,
    held: EngineMemory,
    device: torch.device,
    kernels_name: str,
    tokenizer_dir: Path,
    max_model_len: int,
) -> Ready:
    """What the API process needs to know of an engine that can serve. `max_model_len`: tokens, see `EngineMemory.longest`."""
    spec = source.spec
    return Ready(
        model_id=source.model_id,
        base_id=loaded.base_id,
        architecture=spec.architecture,
        dtype=model_settings.dtype,
        device=device_name(device),
        kernels=kernels_name,
        vocab_size=spec.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=spec.eos_token_ids,
        tokenizer_dir=str(tokenizer_dir),
        linears=spec.linear_kinds,
        kv_block_count=held.blocks.block_limit,
        kv_block_size=held.kv.block_size,
        max_rank=adapter_settings.max_rank,
    )
