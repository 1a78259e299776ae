"""A GGUF file written from a tiny transformers model, loaded back: names, permuted rows, configuration, logits."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from node.errors import ModelLoadError
from node.models.gguf_config import gguf_config
from node.models.gguf_file import GgufFile
from node.models.rope import inverse_frequencies
from node.models.rope_config import rope_config

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name):
    module, _, kind = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{LAYER[rest]}.{kind}"


def interleaved(tensor, heads):
    """Each head's rows as llama.cpp's converter writes them: 0, d/2, 1, d/2 + 1, ..."""
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(path, tiny, architecture, extra_metadata=None, extra_tensors=None):
    config = tiny.reference.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if architecture != "qwen2" else 16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(2)
    for key, value in (extra_metadata or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, tensor in tiny.reference.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        for which, count in heads.items():
            if architecture == "llama" and f".{which}_proj." in name:
                array = interleaved(array, count)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    for name, array in (extra_tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("llama", "llama"), ("llama-tied", "llama"), ("llama-biased", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
def test_load_gguf_of_each_family_equals_its_source(family, architecture, make_tiny, load, drive, prompts, error, tmp_path):
    tiny = make_tiny(family)
    driver = drive(load(write_gguf(tmp_path / "tiny.gguf", tiny, architecture)))
    driver.add("a", prompts["a"])

    logits = driver.run([{"a": 29}])["a"]

    assert error(logits, tiny.logits(prompts["a"])) < 1e-4


def test_load_gguf_rope_factors_equal_llama3_scaling(make_tiny, load, drive, prompts, error, tmp_path):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    tiny = make_tiny("llama", rope_parameters=scaling)
    plain = inverse_frequencies(rope_config({"rope_theta": 1e4}, 16, 128), 128)[0]
    scaled = inverse_frequencies(rope_config({"rope_parameters": scaling}, 16, 128), 128)[0]
    path = write_gguf(tmp_path / "tiny.gguf", tiny, "llama", extra_tensors={"rope_freqs.weight": (plain / scaled).numpy()})
    driver = drive(load(path))
    driver.add("a", prompts["a"])

    assert error(driver.run([{"a": 29}])["a"], tiny.logits(prompts["a"])) < 1e-4


def test_load_gguf_yarn_equals_transformers(make_tiny, load, drive, prompts, error, tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    tiny = make_tiny("qwen3", rope_parameters=yarn)
    metadata = {
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 32,
    }
    driver = drive(load(write_gguf(tmp_path / "tiny.gguf", tiny, "qwen3", metadata)))
    driver.add("a", prompts["a"])

    assert error(driver.run([{"a": 29}])["a"], tiny.logits(prompts["a"])) < 1e-4


@pytest.mark.parametrize(
    ("architecture", "metadata", "named"),
    [
        ("gemma2", {}, "gemma2"),
        ("llama", {"llama.expert_count": 8}, "8 experts"),
        ("llama", {"llama.rope.dimension_count": 8}, "8 of 16"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, "longrope"),
    ],
)
def test_gguf_config_unsupported_is_refused_by_name(architecture, metadata, named, tiny_llama, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama, architecture, metadata)

    with pytest.raises(ModelLoadError) as caught:
        gguf_config(GgufFile(path))

    assert named in caught.value.message
    assert caught.value.error_code == "model_unsupported"


def test_load_gguf_unknown_tensor_is_refused_by_name(tiny_llama, load, tmp_path):
    extra = {"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)}
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama, "llama", extra_tensors=extra)

    with pytest.raises(ModelLoadError, match=r"blk\.0\.ffn_gate_inp\.weight"):
        load(path, dtype=torch.float32)
