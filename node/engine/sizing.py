"""Sizes that the settings leave open, for the device that runs. This table is the only place that derives them.

| setting | CPU | GPU | why |
|---|---|---|---|
| engine.kv_block_size | 16 | 64 | small blocks share short prefixes; a GPU's attention reads blocks of 64 whole |
| engine.max_sequences | 64 | 256 | the largest batch whose step is bound by memory |
| engine.max_batch_tokens | 512 | 8192 + max_sequences | prompts for 0.2 s (8B), beside everybody's row |
| rows of a step that prompts are spread over | all | 256, 512 | `engine/spread.py` |
| adapters.page_rank | 8 | 16 | 8 wastes least; 16 is the height of a tensor core's tile |
| adapters.memory_bytes | 256 MiB | a quarter of what base and reserve leave | 8B, 80 GB: about 180 adapters of rank 16 |
| engine.kv_cache_bytes | 256 MiB | the rest | |

No torch here: the API process reads `MAX_SEQUENCES_GPU`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from node.config import AdapterSettings, EngineSettings
from node.errors import ConfigError

MAX_SEQUENCES_GPU = 256
PROMPT_ROWS_GPU = 8192
SPREAD_SIZES_GPU = ((288, 4096), (512, 4096))
ADAPTER_SHARE = 4  # a quarter
GRAPH_BYTES = 1 << 30  # CUDA graphs, activations in their pool, and what the libraries keep for themselves
_CPU_BYTES = 256 << 20

MAX_FILL_THREADS = 8

DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Sizes of a step and of a page, known before the model is loaded."""

    kv_block_size: int
    max_sequences: int
    max_batch_tokens: int
    page_rank: int
    spread_sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class MemorySizes:
    """Bytes for keys and values, and for adapters."""

    kv_cache_bytes: int
    adapter_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceSizes:
    """Bounds of a GPU's step.

    Attributes:
        head_module: The output projection's row in `LoraPool.ranks`.
        processors: Of the GPU: as many blocks share a step's adapters.
    """

    max_sequences: int
    max_batch_tokens: int
    max_model_len: int
    vocab_size: int
    head_module: int
    processors: int


def step_sizes(settings: EngineSettings, adapters: AdapterSettings, device: DeviceKind) -> StepSizes:
    """What the settings say, else the table's value for this device."""
    is_gpu = device == "cuda"
    max_sequences = settings.max_sequences or (MAX_SEQUENCES_GPU if is_gpu else 64)
    return StepSizes(
        kv_block_size=settings.kv_block_size or (64 if is_gpu else 16),
        max_sequences=max_sequences,
        max_batch_tokens=settings.max_batch_tokens or (PROMPT_ROWS_GPU + max_sequences if is_gpu else 512),
        page_rank=adapters.page_rank or (16 if is_gpu else 8),
        spread_sizes=SPREAD_SIZES_GPU if is_gpu else (),
    )


def memory_sizes(
    settings: EngineSettings, adapters: AdapterSettings, free_bytes: int | None, reserve_bytes: int = 0
) -> MemorySizes:
    """Share out what the base model leaves.

    Args:
        free_bytes: Free memory of the GPU with the base model loaded; None on a CPU, where the settings alone decide.
        reserve_bytes: What a step's own tensors take, see `step_bytes`.

    Raises:
        ConfigError: The GPU is full before adapters and keys and values have a place.
    """
    if free_bytes is None:
        kv, pool = settings.kv_cache_bytes, adapters.memory_bytes
        return MemorySizes(_CPU_BYTES if kv is None else kv, _CPU_BYTES if pool is None else pool)
    left = free_bytes - reserve_bytes - GRAPH_BYTES
    if left <= 0:
        raise ConfigError(
            f"the GPU has {free_bytes} bytes free beside the base model and a step takes {reserve_bytes + GRAPH_BYTES}; "
            "lower engine.max_batch_tokens or choose a smaller model"
        )
    pool = left // ADAPTER_SHARE if adapters.memory_bytes is None else adapters.memory_bytes
    kv = left - pool if settings.kv_cache_bytes is None else settings.kv_cache_bytes
    if kv < 0 or kv + pool > left:
        raise ConfigError(
            f"adapters.memory_bytes is {pool} and engine.kv_cache_bytes {max(kv, 0)}; the GPU has {left} bytes for both; "
            "lower them"
        )
    return MemorySizes(kv, pool)


def step_bytes(rows: int, widest: int, hidden: int, logit_rows: int, vocab: int, itemsize: int) -> int:
    """Bound on the memory of one step: the widest product with its float32 planes, activations, logits and the sampler's copies.

    Args:
        rows: `max_batch_tokens`. widest: outputs of the widest fused product. hidden: of the model.
        logit_rows: `max_sequences`. vocab: of the model. itemsize: bytes of an activation.
    """
    products = rows * widest * (itemsize + 2 * itemsize)
    activations = rows * hidden * (6 * itemsize)
    return products + activations + 4 * logit_rows * vocab * 4


def fill_threads(device: str, cores: int) -> int:
    """Threads that write the masks of grammars: beside a GPU's step half the cores rest; a CPU's kernels need them all."""
    return 1 if device == "cpu" else max(1, min(MAX_FILL_THREADS, cores // 2))
