"""A GGUF file's metadata as the config.json that transformers would have written for the same model.

One form for both formats keeps the checks in one place (`node.models.spec`). llama.cpp knows Mistral as "llama".
"""

from __future__ import annotations

from typing import Any

from node.errors import ModelLoadError
from node.models.gguf_file import GgufFile

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_SCALING_TYPES = {"none": "default", "linear": "linear", "yarn": "yarn"}


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """Return the transformers configuration that describes this file.

    Raises:
        ModelLoadError: model_unsupported for other architectures, experts, partial rotary; model_corrupt when a size is missing.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelLoadError(
            f"{file.path} is of architecture {architecture!r}; GGUF files of {', '.join(ARCHITECTURES)} run; use another model"
        )
    known = _Known(file, architecture)
    if known.get("expert_count", 0):
        raise ModelLoadError(f"{file.path} has {known.get('expert_count', 0)} experts; mixtures of experts are not supported")
    head_count = known.need("attention.head_count")
    hidden_size = known.need("embedding_length")
    head_dim = known.get("attention.key_length", hidden_size // head_count)
    rotated = known.get("rope.dimension_count", head_dim)
    if rotated != head_dim or known.get("attention.value_length", head_dim) != head_dim:
        raise ModelLoadError(f"{file.path} rotates {rotated} of {head_dim} dimensions of a head; only whole heads are supported")
    window = known.get("attention.sliding_window", None)
    slides = architecture == "llama" and window is not None
    return {
        "model_type": "mistral" if slides else architecture,
        "sliding_window": window,
        "hidden_size": hidden_size,
        "intermediate_size": known.need("feed_forward_length"),
        "num_hidden_layers": known.need("block_count"),
        "num_attention_heads": head_count,
        "num_key_value_heads": known.get("attention.head_count_kv", head_count),
        "head_dim": head_dim,
        "rms_norm_eps": known.need("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": known.need("context_length"),
        "vocab_size": _vocab_size(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "rope_parameters": _rope_parameters(known),
        "eos_token_id": _eos_ids(file),
    }


class _Known:
    """Metadata under the architecture's prefix."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._file = file
        self._prefix = architecture + "."

    def get(self, key: str, default: Any) -> Any:
        return self._file.metadata.get(self._prefix + key, default)

    def need(self, key: str) -> Any:
        value = self.get(key, None)
        if value is None:
            raise ModelLoadError(f"{self._file.path} has no {self._prefix}{key}; download the model again", code="model_corrupt")
        if isinstance(value, list):
            raise ModelLoadError(
                f"{self._prefix}{key} of {self._file.path} differs by layer; one value for all layers is supported"
            )
        return value


def _vocab_size(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelLoadError(f"{file.path} has no tensor token_embd.weight; download the model again", code="model_corrupt")
    return embedding.shape[0]


def _rope_parameters(known: _Known) -> dict[str, Any]:
    """Llama 3's scaling has no key: llama.cpp stores it as the tensor rope_freqs.weight, which the loader applies."""
    parameters: dict[str, Any] = {"rope_theta": known.get("rope.freq_base", 10_000.0)}
    scaling = known.get("rope.scaling.type", "none")
    if scaling not in _SCALING_TYPES:
        raise ModelLoadError(
            f"rope.scaling.type is {scaling!r}; supported are {', '.join(_SCALING_TYPES)}; use another base model"
        )
    parameters["rope_type"] = _SCALING_TYPES[scaling]
    if scaling != "none":
        parameters["factor"] = known.get("rope.scaling.factor", 1.0)
        parameters["original_max_position_embeddings"] = known.get("rope.scaling.original_context_length", None)
    return parameters


def _eos_ids(file: GgufFile) -> list[int]:
    """End of sequence and, in newer files, end of turn."""
    found = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return [token_id for token_id in found if isinstance(token_id, int)]
