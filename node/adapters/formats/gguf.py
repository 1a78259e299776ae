"""A llama.cpp LoRA adapter (GGUF) as if PEFT had saved it: the same names, the same order of rows, the same settings.

What is read becomes the tensors of the equivalent PEFT adapter, so everything after this module (binding, content hash, pages)
knows one format. A GGUF file converted from a PEFT adapter without loss therefore has the PEFT adapter's identity.

Rules, all of them part of the identity (`attribution/README.md`):
- "blk.N.attn_q.weight.lora_a" [r, in] is "model.layers.N.self_attn.q_proj.lora_A.weight", ".lora_b" [out, r] is "lora_B.weight";
  "token_embd.weight.lora_a" is stored [V, r] and transposed back to "lora_embedding_A".
- Architecture "llama" stores rows of queries and keys permuted within each head; they are put back.
- F32, F16 and BF16 keep their type; quantised tensors become F32, dequantised exactly as ggml does.
- The scale is adapter.lora.alpha / r, and 1 where alpha is 0 or absent, as llama.cpp has it.

Source: convert_lora_to_gguf.py and src/llama-adapter.cpp of llama.cpp.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from gguf import dequantize

from node.adapters.regular_file import open_regular, read_exactly
from node.adapters.safetensors_file import MAX_TENSORS, NUMPY_TYPES, TensorEntry
from node.errors import AdapterInvalidError, ModelLoadError
from node.models.gguf_file import GgufFile, GgufTensor
from node.request import LinearShape

MAX_HEADER_BYTES = 16 << 20
SUPPORTED_ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3")
PERMUTED_ARCHITECTURES = ("llama",)
_LAYER_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PHI_MODULES = {"ffn_up": "mlp.gate_up_proj"}  # llama.cpp names Phi's fused matrix after its second half
_BLOCK = re.compile(r"blk\.(\d{1,5})\.(\w+)\.weight\.(lora_a|lora_b)")
_TOP = re.compile(r"(token_embd|output)\.weight\.(lora_a|lora_b)")


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a tensor's numbers come from: the GGUF tensor, the heads its rows are permuted in (0: none), whether to transpose."""

    tensor: GgufTensor
    head_count: int
    is_transposed: bool


class GgufAdapterFile:
    """An open GGUF adapter under PEFT's names. Read-only; reads are positional, so threads may share it.

    Attributes:
        entries: Every tensor by PEFT's name, with the type and shape that `read` gives.
        size_bytes: Length of the file.
        config: The adapter_config.json that PEFT would have written.
    """

    def __init__(self, descriptor: int, name: str, size_bytes: int, parsed: GgufFile, heads: Mapping[str, int]) -> None:
        self._descriptor = descriptor
        self._name = name
        self.size_bytes = size_bytes
        architecture = _check_kind(name, parsed.metadata)
        self._sources = _sources(name, parsed, architecture, heads)
        self.entries = {key: _entry(key, source) for key, source in self._sources.items()}
        self.config = _config(name, parsed.metadata, self.entries)

    @classmethod
    def open(cls, path: Path, max_bytes: int, linears: Mapping[str, LinearShape]) -> Self:
        """Open and check `path`.

        Args:
            path: A regular file. max_bytes: Limit on its length.
            linears: The base's linear modules by full name; their head counts undo llama.cpp's permutation.

        Raises:
            AdapterInvalidError: adapter_format_unsupported, adapter_corrupt, adapter_too_large, adapter_feature_unsupported,
                adapter_config_invalid. The message names the file, never its folder.
        """
        descriptor, size_bytes = open_regular(path, max_bytes)
        try:
            heads = {name: shape.head_count for name, shape in linears.items()}
            return cls(descriptor, path.name, size_bytes, _parse(descriptor, path.name), heads)
        except BaseException:
            os.close(descriptor)
            raise

    def read(self, name: str) -> npt.NDArray[Any]:
        """One tensor as PEFT has it: float32, float16, or uint16 holding the bits of bfloat16."""
        source = self._sources[name]
        tensor = source.tensor
        raw = np.frombuffer(read_exactly(self._descriptor, self._name, tensor.offset, tensor.size_bytes), np.uint8)
        if tensor.quantisation.name in NUMPY_TYPES:
            values = raw.view(NUMPY_TYPES[tensor.quantisation.name]).reshape(tensor.shape)
        else:
            rows = raw.reshape(tensor.shape[0], -1)
            with np.errstate(all="ignore"):  # infinite scales are found by whoever looks for NaN, and refused there
                values = np.asarray(dequantize(rows, tensor.quantisation), dtype=np.float32).reshape(tensor.shape)
        if source.head_count:
            values = _unpermuted(values, source.head_count)
        return np.ascontiguousarray(values.T if source.is_transposed else values)

    def read_bytes(self, name: str) -> bytes:
        """The little-endian bytes of `read`."""
        return self.read(name).tobytes()

    def close(self) -> None:
        """Close the file. The arrays handed out stay valid."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _parse(descriptor: int, name: str) -> GgufFile:
    try:
        parsed = GgufFile.from_descriptor(descriptor, name, header_limit_bytes=MAX_HEADER_BYTES)
    except ModelLoadError as error:
        code = "adapter_corrupt" if error.error_code == "model_corrupt" else "adapter_format_unsupported"
        raise AdapterInvalidError(f"{name} is not a GGUF adapter this node reads: {error.message}", code=code) from error
    if not parsed.tensors:
        raise AdapterInvalidError(f"{name} holds no tensors")
    if len(parsed.tensors) > MAX_TENSORS:
        raise AdapterInvalidError(
            f"{name} describes {len(parsed.tensors)} tensors; the limit is {MAX_TENSORS}", code="adapter_too_many_tensors"
        )
    return parsed


def _check_kind(name: str, metadata: Mapping[str, Any]) -> str:
    """The architecture; refused by name: whole models, control vectors, activated LoRA, other architectures."""
    kind, adapter_type = metadata.get("general.type"), metadata.get("adapter.type")
    if kind != "adapter" or adapter_type != "lora":
        raise AdapterInvalidError(
            f"{name} is a GGUF file of type {str(kind)[:40]!a} ({str(adapter_type)[:40]!a}); a LoRA adapter is needed",
            code="adapter_format_unsupported",
        )
    if metadata.get("adapter.alora.invocation_tokens"):
        raise AdapterInvalidError(
            f"{name} is an activated LoRA (adapter.alora.invocation_tokens); this node applies an adapter to every token",
            code="adapter_feature_unsupported",
        )
    architecture = metadata.get("general.architecture")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise AdapterInvalidError(
            f"{name} is for the architecture {str(architecture)[:40]!a}; this node reads {', '.join(SUPPORTED_ARCHITECTURES)}",
            code="adapter_base_mismatch",
        )
    return str(architecture)


def _sources(name: str, parsed: GgufFile, architecture: str, heads: Mapping[str, int]) -> dict[str, _Source]:
    found: dict[str, _Source] = {}

    def add(key: str, source: _Source) -> None:
        if key in found:
            raise AdapterInvalidError(f"{name}: two tensors are {key}; an adapter has each once")
        found[key] = source

    for tensor in parsed.tensors.values():
        if len(tensor.shape) != 2:
            raise AdapterInvalidError(f"{name}: tensor {tensor.name[:120]!a} has {len(tensor.shape)} dimensions; a factor has 2")
        module, side = _module_of(name, tensor.name, architecture)
        is_a = side == "lora_a"
        if module == "model.embed_tokens":
            add(f"{module}.lora_embedding_{'A' if is_a else 'B'}", _Source(tensor, 0, is_a))
            continue
        permuted = architecture in PERMUTED_ARCHITECTURES and module.endswith((".q_proj", ".k_proj")) and not is_a
        head_count = heads.get(module, 0) if permuted else 0
        if head_count and tensor.shape[0] % (2 * head_count):
            raise AdapterInvalidError(
                f"{name}: {module} has {tensor.shape[0]} rows for {head_count} heads of this base model; it is of another",
                code="adapter_base_mismatch",
            )
        add(f"{module}.lora_{'A' if is_a else 'B'}.weight", _Source(tensor, head_count, False))
    return found


def _module_of(name: str, tensor: str, architecture: str) -> tuple[str, str]:
    block = _BLOCK.fullmatch(tensor)
    if block is not None:
        modules = {**_LAYER_MODULES, **(_PHI_MODULES if architecture == "phi3" else {})}
        if block[2] in modules:
            return f"model.layers.{int(block[1])}.{modules[block[2]]}", block[3]
    top = _TOP.fullmatch(tensor)
    if top is not None:
        return ("model.embed_tokens" if top[1] == "token_embd" else "lm_head"), top[2]
    raise AdapterInvalidError(
        f"{name}: tensor {tensor[:120]!a} is not a LoRA factor of a module this node serves", code="adapter_feature_unsupported"
    )


def _entry(name: str, source: _Source) -> TensorEntry:
    tensor = source.tensor
    dtype = tensor.quantisation.name if tensor.quantisation.name in NUMPY_TYPES else "F32"
    shape = tuple(reversed(tensor.shape)) if source.is_transposed else tensor.shape
    size_bytes = shape[0] * shape[1] * np.dtype(NUMPY_TYPES[dtype]).itemsize
    return TensorEntry(name, dtype, shape, tensor.offset, size_bytes)


def _config(name: str, metadata: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """The adapter_config.json of the same adapter: rank is the largest, other ranks are a pattern of full module names."""
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1e6:
        raise AdapterInvalidError(
            f"{name}: adapter.lora.alpha is {str(alpha)[:40]}; it must be a number from 0 to 1000000",
            code="adapter_config_invalid",
        )
    ranks = {
        key.partition(".lora_")[0]: entry.shape[0]
        for key, entry in sorted(entries.items())
        if key.endswith((".lora_A.weight", ".lora_embedding_A"))
    }
    largest = max(ranks.values(), default=1)
    others = {module: rank for module, rank in ranks.items() if rank != largest}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": _number(alpha) if alpha else largest,
        "target_modules": sorted(ranks),
    }
    if others:
        config["rank_pattern"] = others
        if not alpha:
            config["alpha_pattern"] = dict(others)
    return config


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def _unpermuted(values: npt.NDArray[Any], head_count: int) -> npt.NDArray[Any]:
    """Rows of each head from (0, d/2, 1, d/2 + 1, ...) back to (0, 1, ..., d - 1). values: [heads * d, r]."""
    rows, rank = values.shape
    pairs = values.reshape(head_count, rows // head_count // 2, 2, rank)
    return pairs.swapaxes(1, 2).reshape(rows, rank)
