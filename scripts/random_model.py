"""Base models of a known shape with random weights, made where they run: for benchmarks, which only need the shape.

`random_source` stands where `node.models.load.open_source` stands. `write_checkpoint` makes the same as files, for what must
start from files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from node.models.load import ModelSource
from node.models.spec import ModelSpec, model_spec

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **_LLAMA,
        "max_position_embeddings": 131072,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tiny": {
        **_LLAMA,
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}


class RandomWeights:
    """`Weights` whose numbers come from a generator on the device: matrices N(0, 1 / inputs), norms 1."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._device = device
        self._shapes = dict(_tensors(spec))

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=self._device)
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
        generator = torch.Generator(self._device).manual_seed(seed)
        return torch.empty(shape, dtype=dtype, device=self._device).normal_(0.0, shape[1] ** -0.5, generator=generator)


def _tensors(spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
    hidden, inter = spec.hidden_size, spec.intermediate_size
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (spec.vocab_size, hidden),
    }
    for layer in range(spec.layer_count):
        at = f"model.layers.{layer}."
        found[at + "input_layernorm.weight"] = found[at + "post_attention_layernorm.weight"] = (hidden,)
        found[at + "self_attn.q_proj.weight"] = (spec.q_size, hidden)
        found[at + "self_attn.k_proj.weight"] = found[at + "self_attn.v_proj.weight"] = (spec.kv_size, hidden)
        found[at + "self_attn.o_proj.weight"] = (hidden, spec.q_size)
        found[at + "mlp.gate_proj.weight"] = found[at + "mlp.up_proj.weight"] = (inter, hidden)
        found[at + "mlp.down_proj.weight"] = (hidden, inter)
    return found


def shape_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a shape, with another number of layers where asked."""
    config = dict(SHAPES[shape])
    return config if layers is None else {**config, "num_hidden_layers": layers}


def random_source(shape: str, device: torch.device, max_model_len: int, layers: int | None = None) -> ModelSource:
    """A model of random weights, named by its shape."""
    spec = model_spec(shape_config(shape, layers), max_model_len)
    name = f"random-{shape}"
    return ModelSource(
        name,
        spec,
        RandomWeights(spec, device),
        lambda: hashlib.sha256(f"{name}-{spec.layer_count}".encode()).hexdigest(),
        lambda directory: _write_words(directory, spec.vocab_size),
    )


def _write_words(directory: Path, vocab_size: int) -> Path:
    """A tokenizer of one word a token, so that any ids can be written as text and read back."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({f"t{index}": index for index in range(vocab_size)}, unk_token="t0"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {name: None for kind in ("bos", "eos", "pad", "unk") for name in (f"{kind}_token", f"{kind}_token_id")}
    special = {**names, "eos_token": "t2", "eos_token_id": 2, "eos_token_ids": [2], "add_bos": False}
    (directory / "special_tokens.json").write_text(json.dumps(special))
    return directory


def write_checkpoint(shape: str, directory: Path, device: torch.device, layers: int | None = None, shard_count: int = 16) -> Path:
    """The same model as bfloat16 safetensors with config and tokenizer, one thread a file."""
    config = shape_config(shape, layers)
    weights = RandomWeights(model_spec(config, None), device)
    _write_words(directory, config["vocab_size"])
    (directory / "special_tokens.json").unlink()
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    names = sorted(weights.names(), key=lambda name: -math.prod(weights.shape(name)))
    files = [f"model-{index + 1:05d}-of-{shard_count:05d}.safetensors" for index in range(shard_count)]
    with ThreadPoolExecutor(shard_count) as threads:
        list(threads.map(lambda i: _write_shard(directory / files[i], weights, names[i::shard_count]), range(shard_count)))
    index = {"weight_map": {name: files[place % shard_count] for place, name in enumerate(names)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _write_shard(path: Path, weights: RandomWeights, names: Sequence[str]) -> None:
    """One safetensors file, a tensor at a time: nothing is held twice, and writing leaves the interpreter to other threads."""
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        start, end = end, end + 2 * math.prod(weights.shape(name))
        header[name] = {"dtype": "BF16", "shape": weights.shape(name), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            left = memoryview(weights.read(name, torch.bfloat16).cpu().view(torch.uint8).flatten().numpy())
            while left:
                left = left[file.write(left) :]
