"""What kind of decoder a model is: every size and switch that the loader and the decoder need, checked.

Supported are the decoders of transformers' `llama`, `mistral`, `qwen2`, `qwen3` and `phi3` model types. They share one skeleton
and differ in the switches of `ModelSpec`; everything else is refused here, by name, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from node.errors import ModelLoadError
from node.models.rope_config import RopeConfig, rope_config
from node.request import LinearShape

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
_LONGEST_DEFAULT_LEN = 8192  # tokens; a longer context is the operator's choice, it sizes tables and schedules
_SIZE_LIMIT = 1 << 24  # of any size in config.json; larger is a damaged file, not a model


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder. Sizes count elements, `max_model_len` tokens.

    Attributes:
        windows: For each layer the number of latest tokens a token attends to, itself included; None attends to all.
        has_qkv_bias, has_o_bias, has_mlp_bias: Which linear modules add a bias.
        has_qk_norm: Queries and keys are normalised per head before rotation (Qwen3).
        is_tied: The output projection is the embedding matrix.
        eos_token_ids: Every id that ends an answer, ascending.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_count: int
    head_count: int
    kv_head_count: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    has_qkv_bias: bool
    has_o_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool
    is_tied: bool
    eos_token_ids: tuple[int, ...]
    max_model_len: int

    @property
    def has_fused_weights(self) -> bool:
        """The checkpoint stores q, k and v as one matrix, gate and up as another (Phi-3)."""
        return self.architecture == "phi3"

    @property
    def q_size(self) -> int:
        return self.head_count * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_head_count * self.head_dim

    @property
    def linear_kinds(self) -> tuple[LinearShape, ...]:
        """The kinds of linear modules in the order of a layer, then the output projection."""
        attention, mlp = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
        hidden, inter, layers = self.hidden_size, self.intermediate_size, self.layer_count
        return (
            LinearShape(attention + "q_proj", hidden, self.q_size, layers, self.head_count),
            LinearShape(attention + "k_proj", hidden, self.kv_size, layers, self.kv_head_count),
            LinearShape(attention + "v_proj", hidden, self.kv_size, layers),
            LinearShape(attention + "o_proj", self.q_size, hidden, layers),
            LinearShape(mlp + "gate_proj", hidden, inter, layers),
            LinearShape(mlp + "up_proj", hidden, inter, layers),
            LinearShape(mlp + "down_proj", inter, hidden, layers),
            LinearShape("lm_head", hidden, self.vocab_size, 1),
        )

    @property
    def linears(self) -> tuple[tuple[str, int, int], ...]:
        """(name, in_features, out_features) of every linear module in model order, named as PEFT names them: for PageLayout."""
        *layered, head = self.linear_kinds
        modules = [
            (kind.name.format(layer=layer), kind.in_features, kind.out_features)
            for layer in range(self.layer_count)
            for kind in layered
        ]
        return (*modules, (head.name, head.in_features, head.out_features))


def model_spec(config: Mapping[str, Any], max_model_len: int | None, extra_eos_ids: tuple[int, ...] = ()) -> ModelSpec:
    """Check a configuration and say what decoder it describes.

    Args:
        config: The content of a transformers config.json.
        max_model_len: The longest context to serve, tokens; None for what the model was trained for, at most 8192.
        extra_eos_ids: End-of-sequence ids of generation_config.json.

    Raises:
        ModelLoadError: model_unsupported. The reason names the field, its value and what is supported.
    """
    model_type = _supported_type(config)
    head_count = _size(config, "num_attention_heads")
    hidden_size = _size(config, "hidden_size")
    head_dim = _size(config, "head_dim", 128 if model_type == "qwen3" else hidden_size // head_count)
    kv_head_count = _size(config, "num_key_value_heads", 8 if model_type == "mistral" else head_count)
    if head_count % kv_head_count:
        raise ModelLoadError(f"num_attention_heads {head_count} is not a multiple of num_key_value_heads {kv_head_count}")
    layer_count = _size(config, "num_hidden_layers")
    rope = rope_config(config, head_dim, _size(config, "max_position_embeddings"))
    if model_type == "phi3" and rope.rope_type != "default":
        raise ModelLoadError(
            f"rope_type is {rope.rope_type!r}, which Phi-3 calls its long rotation by; only its 4k models are supported"
        )
    has_bias = model_type in ("llama", "qwen3") and bool(config.get("attention_bias", False))
    return ModelSpec(
        architecture=model_type,
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size"),
        layer_count=layer_count,
        head_count=head_count,
        kv_head_count=kv_head_count,
        head_dim=head_dim,
        rms_norm_eps=_epsilon(config),
        rope=rope,
        windows=_windows(config, model_type, layer_count),
        has_qkv_bias=has_bias or model_type == "qwen2",
        has_o_bias=has_bias,
        has_mlp_bias=model_type == "llama" and bool(config.get("mlp_bias", False)),
        has_qk_norm=model_type == "qwen3",
        is_tied=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=tuple(sorted({*_token_ids(config), *extra_eos_ids})),
        max_model_len=_served_len(rope, max_model_len),
    )


def _supported_type(config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ModelLoadError(
            f"model_type {model_type!r} is not supported; this node runs {', '.join(MODEL_TYPES)}; set model.path to one of those"
        )
    architectures = config.get("architectures") or []
    if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise ModelLoadError(f"architectures is {architectures}; a causal language model (...ForCausalLM) is needed")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unnamed")
        raise ModelLoadError(f"quantization_config names {method!r}; use the model's unquantised checkpoint or a GGUF file")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelLoadError(f"hidden_act is {activation!r}; only silu is supported; use another base model")
    return str(model_type)


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _SIZE_LIMIT:
        raise ModelLoadError(f"{key} of the model's configuration is {value!r}; a whole number from 1 to {_SIZE_LIMIT} is needed")
    return value


def _epsilon(config: Mapping[str, Any]) -> float:
    value = config.get("rms_norm_eps", 1e-5 if config["model_type"] == "phi3" else 1e-6)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ModelLoadError(f"rms_norm_eps of the model's configuration is {value!r}; a number between 0 and 1 is needed")
    return float(value)


def _windows(config: Mapping[str, Any], model_type: str, layer_count: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, by transformers' rules: Mistral slides everywhere, Qwen from a layer on, Llama never."""
    if model_type == "llama":
        return (None,) * layer_count
    if model_type == "phi3":
        return (None if config.get("sliding_window") is None else _size(config, "sliding_window"),) * layer_count
    window = None if config.get("sliding_window", 4096) is None else _size(config, "sliding_window", 4096)
    if model_type == "mistral":
        return (window,) * layer_count
    if not config.get("use_sliding_window", False):
        window = None
    kinds = config.get("layer_types") or _qwen_layer_types(config, layer_count)
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or len(kinds) != layer_count:
        raise ModelLoadError(
            f"layer_types has {len(kinds)} entries, unknown among them {unknown}; "
            f"{layer_count} entries of full_attention or sliding_attention are needed"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _qwen_layer_types(config: Mapping[str, Any], layer_count: int) -> list[str]:
    first = int(config.get("max_window_layers", 28))
    return ["sliding_attention" if layer >= first else "full_attention" for layer in range(layer_count)]


def _token_ids(config: Mapping[str, Any]) -> list[int]:
    """`eos_token_id` is one id, several or null; Llama's, Mistral's and Phi's configurations leave the default out."""
    default = {"llama": 2, "mistral": 2, "phi3": 32000}.get(config["model_type"])
    value = config.get("eos_token_id", default)
    values = value if isinstance(value, list) else [value]
    return [int(item) for item in values if isinstance(item, int)]


def _served_len(rope: RopeConfig, asked_len: int | None) -> int:
    if asked_len is None:
        return min(rope.trained_len, _LONGEST_DEFAULT_LEN)
    if asked_len > rope.longest_len:
        raise ModelLoadError(
            f"max_model_len is {asked_len} tokens and this model reaches {rope.longest_len}; lower model.max_model_len"
        )
    return asked_len
