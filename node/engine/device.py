"""What depends on the device that runs: kernels, memory and the runner."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from node.adapters.pool import AdapterPool
from node.config import EngineSettings
from node.engine.grammar_masks import GrammarMasks
from node.engine.graphs import buckets_for
from node.engine.runner import LogitsWatcher, Runner
from node.engine.sizing import DeviceSizes, StepSizes, step_bytes
from node.errors import ConfigError
from node.kernels.attention.paged import AttentionShape
from node.kernels.attention.registry import open_attention
from node.kernels.build import library_path
from node.kernels.build_cuda import cuda_library_path
from node.kernels.ops import Kernels
from node.kernels.torch_kernels import TorchKernels
from node.models.inputs import KVCache
from node.models.load import LoadedModel
from node.models.spec import ModelSpec

OLDEST_CAPABILITY = (8, 0)
GPU_HOST_THREADS = 4  # of torch's own operations beside a GPU: filling tensors at start

logger = logging.getLogger(__name__)


def choose_device(setting: str) -> torch.device:
    """The device that `model.device` names.

    Raises:
        ConfigError: "cuda" without a GPU that this node can use.
    """
    if setting == "cpu":
        return torch.device("cpu")
    problem = _gpu_problem()
    if problem is None:
        return torch.device("cuda", torch.cuda.current_device())
    if setting == "cuda":
        raise ConfigError(f'model.device is "cuda" and {problem}; set it to auto or cpu')
    return torch.device("cpu")


def _gpu_problem() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU here"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        return f"this GPU has compute capability {capability[0]}.{capability[1]}, 8.0 is the oldest supported"
    return None


def device_name(device: torch.device) -> str:
    """ "cpu", or the GPU's own name."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def open_kernels(
    device: torch.device, settings: EngineSettings, sizes: StepSizes, spec: ModelSpec, dtype: torch.dtype
) -> Kernels[Any, Any]:
    """Choose the kernels, and set this process's number of compute threads.

    Raises:
        ConfigError: The settings ask for kernels that cannot run here.
    """
    threads = settings.threads or os.cpu_count() or 1
    if device.type == "cpu":
        kernels = Kernels.load(settings.kernels, threads=threads, is_deterministic=settings.deterministic)
        # The compiled kernels have threads of their own; torch's, once awake, would spin on the same cores for milliseconds.
        torch.set_num_threads(threads if kernels.name == "reference" else 1)
        return kernels
    torch.set_num_threads(min(threads, GPU_HOST_THREADS))
    torch.cuda.set_device(device)
    if library_path() is None:
        logger.warning(
            "the C++ kernels are not built: numpy reads adapters and prepares their steps, several times slower; "
            "install g++ and run `python -m node.kernels.build`"
        )
    if settings.kernels == "reference":
        return TorchKernels(is_deterministic=settings.deterministic, device=device)
    if cuda_library_path() is None:
        if settings.kernels == "cpp":
            raise ConfigError("the CUDA kernels of these sources are not built; run `python -m node.kernels.build` where nvcc is")
        logger.warning(
            "the CUDA kernels are not built: plain torch runs on the GPU, many times slower; run `python -m node.kernels.build`"
        )
        return TorchKernels(is_deterministic=settings.deterministic, device=device)
    return _open_cuda(device, settings, sizes, spec, dtype)


def _open_cuda(
    device: torch.device, settings: EngineSettings, sizes: StepSizes, spec: ModelSpec, dtype: torch.dtype
) -> Kernels[Any, Any]:
    from node.kernels.cuda_kernels import CudaKernels

    shape = AttentionShape(
        heads=spec.head_count,
        groups=spec.kv_head_count,
        head_dim=spec.head_dim,
        block_size=sizes.kv_block_size,
        dtype=dtype,
        scale=spec.head_dim**-0.5,
        max_batch=buckets_for(sizes.max_sequences)[-1],
        max_context=spec.max_model_len,
        windows=tuple(dict.fromkeys(spec.windows)),
    )
    attention, choice = open_attention(settings.attention, shape, device, is_deterministic=settings.deterministic)
    logger.info("attention by %s: %s", choice.name, choice.reason)
    return CudaKernels(device, attention, is_deterministic=settings.deterministic)


def device_memory(device: torch.device, spec: ModelSpec, sizes: StepSizes, dtype: torch.dtype) -> tuple[int | None, int]:
    """Free bytes of a GPU (None on a CPU), and what a step takes of them."""
    if device.type == "cpu":
        return None, 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    widest = max(2 * spec.intermediate_size, spec.q_size + 2 * spec.kv_size)
    bucket = buckets_for(sizes.max_sequences)[-1]
    reserve = step_bytes(sizes.max_batch_tokens, widest, spec.hidden_size, bucket, spec.vocab_size, dtype.itemsize)
    # Every recorded step keeps its logits, with and without adapters.
    reserve += 2 * sum(buckets_for(sizes.max_sequences)) * spec.vocab_size * 4
    return free, reserve


@contextmanager
def compiled_beside(device: torch.device, vocab_size: int) -> Iterator[Callable[[], None]]:
    """Compile what draws tokens on a thread of its own while the block runs; done when it ends. Yields what waits for it.

    Nothing of it depends on weights or memory, and most of it is another process's work (ptxas): 5 s at a node's first start.
    """
    if device.type == "cpu":
        yield lambda: None
        return
    with ThreadPoolExecutor(1, thread_name_prefix="compile-sampler") as threads:
        compiled = threads.submit(_compile_sampler, device, vocab_size)
        yield compiled.result
        compiled.result()


def _compile_sampler(device: torch.device, vocab_size: int) -> None:
    from node.engine.device_sampler import DeviceSampler

    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.inference_mode(), torch.cuda.device(device), torch.cuda.stream(stream):
        DeviceSampler(vocab_size, 1, device).warm_up()
        stream.synchronize()


def open_runner(
    loaded: LoadedModel,
    kernels: Kernels[Any, Any],
    kv: KVCache,
    adapters: AdapterPool,
    grammars: GrammarMasks,
    sizes: StepSizes,
    max_model_len: int,
    watch_logits: LogitsWatcher | None,
    wait_for_sampler: Callable[[], None],
) -> Any:
    """The runner of this device, ready for its first step once the weights are there.

    Args:
        wait_for_sampler: From `compiled_beside`.
    """
    if kernels.device.type == "cpu":
        return Runner(loaded.model, kv, adapters, grammars, watch_logits)
    from node.engine.device_runner import DeviceRunner

    has_graphs = kernels.takes_tiles
    if has_graphs:
        kernels.attach(adapters.tensors)  # type: ignore[attr-defined]
    head = loaded.layout.spans["lm_head"].index
    limits = DeviceSizes(
        sizes.max_sequences,
        sizes.max_batch_tokens,
        max_model_len,
        loaded.spec.vocab_size,
        head_module=head,
        processors=torch.cuda.get_device_properties(kernels.device).multi_processor_count,
    )
    runner = DeviceRunner(loaded.model, kernels, kv, adapters, grammars, limits, has_graphs=has_graphs, watch_logits=watch_logits)
    if has_graphs:
        runner.warm_up(wait_for_sampler)
    return runner
