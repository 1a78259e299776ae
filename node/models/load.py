"""Load a base model: files in, a decoder that can run out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from node.errors import ModelLoadError
from node.kernels.layout import PageLayout
from node.kernels.memory import empty_huge
from node.kernels.ops import Kernels
from node.models.base_identity import base_id
from node.models.decoder import Decoder
from node.models.decoder_weights import decoder_weights
from node.models.gguf_file import GgufFile
from node.models.gguf_weights import GgufWeights
from node.models.inputs import KVCache
from node.models.model_config import read_spec
from node.models.placement import DevicePlacement, HostPlacement, Placement
from node.models.safetensors_weights import SafetensorsWeights
from node.models.source import ModelFiles
from node.models.spec import ModelSpec
from node.models.tokenizer_files import write_tokenizer
from node.models.weights import Weights

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: The decoder.
        spec: Its sizes; `spec.linear_kinds` is what an adapter may change.
        content_hash: See `base_id`; may still be on its way.
        layout: Where each linear module lies in an adapter page.
        dtype: Of weights, activations and keys and values.
    """

    model: Decoder
    spec: ModelSpec
    content_hash: Future[str]
    layout: PageLayout
    dtype: torch.dtype

    @property
    def base_id(self) -> str:
        """Content hash, 64 hex digits; waits for it."""
        return self.content_hash.result()


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A base model before it is loaded.

    Attributes:
        model_id: The name that clients use.
        spec: Its sizes. weights: its tensors.
        base_id: Returns its content hash, 64 hex digits; may read every byte, or wait for who does.
        write_tokenizer: Writes what the API process reads into a directory and returns it.
    """

    model_id: str
    spec: ModelSpec
    weights: Weights
    base_id: Callable[[], str]
    write_tokenizer: Callable[[Path], Path]


def open_source(
    files: ModelFiles,
    max_model_len: int | None,
    hash_cache: Path | None = None,
    begun_hash: Callable[[], str] | None = None,
) -> ModelSource:
    """Look into a base model's files; reads no weight.

    Args:
        files: From `source.resolve`.
        max_model_len: Longest context, tokens; None for what the model was trained for, at most 8192.
        hash_cache: Where content hashes are remembered between starts; None forgets.
        begun_hash: From `begin_base_id`, where hashing has begun already.

    Raises:
        ModelLoadError: model_unsupported or model_corrupt.
    """
    spec = read_spec(files, max_model_len)
    return ModelSource(
        files.model_id,
        spec,
        _open_weights(files, spec),
        begun_hash or (lambda: base_id(files, hash_cache)),
        lambda directory: write_tokenizer(files, spec.eos_token_ids, directory),
    )


def load_model(source: ModelSource, dtype: torch.dtype, kernels: Kernels[Any, Any], page_rank: int) -> LoadedModel:
    """Read a base model into memory. See `loading`."""
    with loading(source, dtype, kernels, page_rank) as loaded:
        return loaded


@contextmanager
def loading(source: ModelSource, dtype: torch.dtype, kernels: Kernels[Any, Any], page_rank: int) -> Iterator[LoadedModel]:
    """Read a base model into memory. On a GPU its weights have their places at once and come while the block runs, which may
    launch the model, though not for what it answers. When the block has ended they are there, and so is the hash.

    Args:
        dtype: float32 or bfloat16.
        kernels: Packs the weights and runs them, on its device.
        page_rank: Ranks of an adapter page.

    Raises:
        ModelLoadError: model_unsupported, model_corrupt or model_too_large. Refused before memory is spent where possible; a file
            that cannot be read to its end is noticed when the block has ended.
    """
    layout = PageLayout(source.spec.linears, page_rank)
    is_on_cpu = kernels.device.type == "cpu"
    placement: Placement = HostPlacement(source.weights) if is_on_cpu else DevicePlacement(source.weights, kernels.device)
    threads = ThreadPoolExecutor(1, thread_name_prefix="base-hash")
    with closing(placement):
        content_hash = threads.submit(source.base_id)
        threads.shutdown(wait=False)  # who gives up does not wait for it
        if is_on_cpu:
            content_hash.result()  # the CPU is needed for the weights; a GPU's host has cores for both
        with _refused_where_full(source.model_id):
            weights = decoder_weights(source.spec, source.weights, placement, dtype, kernels, layout)
            if placement.needs_room:
                placement.finish()  # before somebody looks how much is left
        yield LoadedModel(Decoder(weights, kernels), source.spec, content_hash, layout, dtype)
        with _refused_where_full(source.model_id):
            placement.finish()
        content_hash.result()


@contextmanager
def _refused_where_full(model_id: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelLoadError(f"{model_id} does not fit into memory; choose a smaller model", code="model_too_large") from error


def make_kv_cache(spec: ModelSpec, size_bytes: int, block_size: int, dtype: torch.dtype, device: torch.device = CPU) -> KVCache:
    """Allocate paged keys and values for all layers in at most `size_bytes`.

    A sequence can never be longer than the whole cache: serve min(`spec.max_model_len`, `block_count * block_size`) tokens.

    Raises:
        ModelLoadError: model_too_large. Not even one block fits.
    """
    block_bytes = 2 * spec.layer_count * spec.kv_size * block_size * dtype.itemsize
    block_count = size_bytes // block_bytes
    if block_count < 1:
        raise ModelLoadError(
            f"a KV cache of {size_bytes} bytes does not hold one block of {block_bytes} bytes; raise engine.kv_cache_bytes",
            code="model_too_large",
        )
    if device.type != "cpu":
        return _device_cache(spec, block_count, block_size, dtype, device)
    shape = (block_count, spec.kv_head_count, block_size, spec.head_dim)
    # Zeros, because a kernel may read a block past a sequence's end; zeros that nobody has touched take no memory.
    keys = [empty_huge(shape, dtype) for _ in range(spec.layer_count)]
    values = [empty_huge(shape, dtype) for _ in range(spec.layer_count)]
    return KVCache(keys, values, block_size)


def _device_cache(spec: ModelSpec, block_count: int, block_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """On a GPU the heads of a token lie side by side: that is how its attention reads and how a step writes."""
    shape = (block_count, block_size, spec.kv_head_count, spec.head_dim)
    both = [[torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(spec.layer_count)] for _ in range(2)]
    return KVCache(both[0], both[1], block_size)


def _open_weights(files: ModelFiles, spec: ModelSpec) -> Weights:
    if files.kind == "gguf":
        return GgufWeights(GgufFile(files.weights[0]), spec.head_count, spec.kv_head_count)
    return SafetensorsWeights(files.weights)
