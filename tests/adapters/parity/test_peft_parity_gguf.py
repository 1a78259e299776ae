"""GGUF adapters: the same answers and, without loss, the same identity as the PEFT adapter they were converted from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from node.errors import AdapterInvalidError

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}
HEADS = {"attn_q": 4, "attn_k": 2}
TYPES = gguf.GGMLQuantizationType


def convert(
    directory: Path,
    target: Path,
    architecture: str = "llama",
    kind: TYPES = TYPES.F32,
    alpha: float | None = None,
    **metadata: Any,
) -> Path:
    """What llama.cpp's convert_lora_to_gguf.py writes, with the `gguf` package's own writer."""
    target.mkdir(exist_ok=True)
    config = json.loads((directory / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(target / "adapter.gguf", architecture)
    writer.add_type(metadata.pop("type", gguf.GGUFType.ADAPTER))
    writer.add_string("adapter.type", metadata.pop("adapter_type", "lora"))
    writer.add_float32("adapter.lora.alpha", config["lora_alpha"] if alpha is None else alpha)
    for key, value in metadata.items():
        writer.add_array(key.replace("__", "."), value)
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        found = _tensor(name, tensor.numpy(), architecture)
        if found is not None:
            own_kind = kind if found[1].shape[-1] % 32 == 0 or kind in (TYPES.F32, TYPES.F16) else TYPES.F32
            writer.add_tensor(found[0], gguf.quantize(found[1], own_kind), raw_dtype=own_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _tensor(name: str, values: np.ndarray, architecture: str) -> tuple[str, np.ndarray] | None:
    name = name.removeprefix("base_model.model.")
    if "base_layer" in name:
        return None
    if name.startswith("model.embed_tokens."):
        is_a = name.endswith("embedding_A")
        return "token_embd.weight.lora_" + ("a" if is_a else "b"), np.ascontiguousarray(values.T if is_a else values)
    side = "a" if ".lora_A." in name else "b"
    if name.startswith("lm_head"):
        return f"output.weight.lora_{side}", values
    _, _, layer, module = name.split(".lora_")[0].split(".", 3)
    tensor = NAMES[module]
    if architecture == "llama" and side == "b" and tensor in HEADS:
        rows, rank = values.shape
        values = values.reshape(HEADS[tensor], 2, rows // HEADS[tensor] // 2, rank).swapaxes(1, 2).reshape(rows, rank)
    return f"blk.{layer}.{tensor}.weight.lora_{side}", np.ascontiguousarray(values)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR},
        {"r": 256, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj"]},
        {"r": 1, "lora_alpha": 3, "target_modules": ALL_LINEAR},
        {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"r": 256, "lora_alpha": 5, "target_modules": ["embed_tokens", "lm_head", "down_proj"]},
    ],
    ids=["all", "rank256", "rank1", "embedding-head", "embedding-head-rank256"],
)
def test_float32_equals_peft(base, same, tmp_path, config, request):
    llama = base()
    directory = llama.adapter(f"gguf-{request.node.callspec.id}", **config)

    ours = llama.ours(convert(directory, tmp_path / "g"))

    assert same(ours, llama.peft(directory)) < 1e-5
    assert same(llama.plain(), ours) > 1e-3


def test_float32_has_the_identity_of_the_peft_adapter(base, tmp_path):
    llama = base()
    directory = llama.adapter("gguf-identity", r=4, lora_alpha=8, target_modules=ALL_LINEAR)

    assert llama.verify(convert(directory, tmp_path / "g")).adapter_id == llama.verify(directory).adapter_id


def test_phi_has_fused_matrices(base, same, tmp_path):
    phi = base("phi3")
    directory = phi.adapter("gguf", r=4, target_modules=["qkv_proj", "gate_up_proj", "o_proj"])
    converted = convert(directory, tmp_path / "g", "phi3")

    assert same(phi.ours(converted), phi.peft(directory)) < 1e-5
    assert phi.verify(converted).adapter_id == phi.verify(directory).adapter_id


def test_qwen_is_not_permuted(base, same, tmp_path):
    qwen = base("qwen2")
    directory = qwen.adapter("gguf", r=4, target_modules=ALL_LINEAR)

    assert same(qwen.ours(convert(directory, tmp_path / "g", "qwen2")), qwen.peft(directory)) < 1e-5


@pytest.mark.parametrize("kind", [TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.Q4_0, TYPES.Q5_1])
def test_quantised_equals_peft_with_the_dequantised_factors(base, same, tmp_path, kind):
    """The reference adapter holds exactly the numbers that ggml reads back."""
    llama = base()
    directory = llama.adapter(f"gguf-{kind.name}", r=32, target_modules=ALL_LINEAR)
    converted = convert(directory, tmp_path / "g", kind=kind)
    file = directory / "adapter_model.safetensors"
    from safetensors.torch import save_file

    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.shape[-1] % 32 == 0 or kind is TYPES.F16:
            permuted = _tensor(name, tensor.numpy(), "llama")
            assert permuted is not None
            read = gguf.dequantize(gguf.quantize(permuted[1], kind), kind).astype(np.float32)
            tensors[name] = torch.from_numpy(_unpermuted(read, name))
    save_file(tensors, file)

    assert same(llama.ours(converted), llama.peft(directory)) < 1e-5


def _unpermuted(values: np.ndarray, name: str) -> np.ndarray:
    heads = 4 if ".q_proj.lora_B" in name else 2 if ".k_proj.lora_B" in name else 0
    if not heads:
        return values.copy()
    rows, rank = values.shape
    return values.reshape(heads, rows // heads // 2, 2, rank).swapaxes(1, 2).reshape(rows, rank).copy()


def test_mixed_ranks_scale_each_module_by_its_own_rank(base, same, tmp_path):
    """llama.cpp divides alpha by the rank of each tensor, as PEFT does with a rank pattern."""
    llama = base()
    directory = llama.adapter("gguf-ranks", r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 12})

    assert same(llama.ours(convert(directory, tmp_path / "g")), llama.peft(directory)) < 1e-5


def test_alpha_zero_means_a_scale_of_one(base, same, tmp_path, edit_config):
    llama = base()
    directory = llama.adapter(
        "gguf-alpha", r=4, lora_alpha=4, target_modules=["q_proj"], rank_pattern={"layers.0.self_attn.q_proj": 6}
    )
    edit_config(directory, alpha_pattern={"layers.0.self_attn.q_proj": 6})

    assert same(llama.ours(convert(directory, tmp_path / "g", alpha=0.0)), llama.peft(directory)) < 1e-5


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"type": "model"}, "adapter_format_unsupported", "'model'"),
        ({"adapter_type": "control"}, "adapter_format_unsupported", "'control'"),
        ({"adapter__alora__invocation_tokens": [1, 2]}, "adapter_feature_unsupported", "activated LoRA"),
        ({"architecture": "gemma2"}, "adapter_base_mismatch", "'gemma2'"),
        ({"alpha": float("nan")}, "adapter_config_invalid", "adapter.lora.alpha"),
        ({"alpha": -2.0}, "adapter_config_invalid", "adapter.lora.alpha"),
    ],
)
def test_other_gguf_files_are_refused_by_name(base, tmp_path, changes, code, text):
    llama = base()
    directory = llama.adapter("gguf-refused", r=2, target_modules=["v_proj"])

    with pytest.raises(AdapterInvalidError, match=text) as caught:
        llama.verify(convert(directory, tmp_path / "g", **changes))

    assert caught.value.error_code == code


def test_every_truncation_is_refused(base, tmp_path):
    llama = base()
    directory = llama.adapter("gguf-cut", r=2, target_modules=["v_proj"])
    whole = (convert(directory, tmp_path / "g") / "adapter.gguf").read_bytes()
    broken = tmp_path / "broken"
    broken.mkdir()
    for length in [*range(0, 400, 7), len(whole) - 1]:
        (broken / "adapter.gguf").write_bytes(whole[:length])

        with pytest.raises(AdapterInvalidError):
            llama.verify(broken)


def test_no_damage_is_more_than_a_refusal(base, tmp_path):
    """Bytes of header and data changed at random: an adapter or a refusal, never another error."""
    llama = base()
    directory = llama.adapter("gguf-damage", r=32, target_modules=["q_proj"])
    file = convert(directory, tmp_path / "g", kind=TYPES.Q8_0) / "adapter.gguf"
    whole, generator, messages = file.read_bytes(), random.Random(4), []
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(generator.choice([1, 2, 5])):
            damaged[generator.randrange(min(700, len(damaged)))] = generator.choice([0, 255, generator.randrange(256)])
        file.write_bytes(damaged)
        try:
            llama.verify(file.parent)
        except AdapterInvalidError as error:
            messages.append(error.message)

    assert len(messages) > 200
    assert not any(str(tmp_path) in message for message in messages)


def test_two_gguf_files_are_refused(base, tmp_path):
    llama = base()
    target = convert(llama.adapter("gguf-two", r=2, target_modules=["v_proj"]), tmp_path / "g")
    (target / "second.gguf").write_bytes((target / "adapter.gguf").read_bytes())

    with pytest.raises(AdapterInvalidError, match="2 GGUF files"):
        llama.verify(target)


def test_a_header_that_claims_a_huge_array_is_refused_before_it_is_built(base, tmp_path):
    llama = base()
    target = tmp_path / "g"
    target.mkdir()
    key = b"general.big"
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    head += len(key).to_bytes(8, "little") + key + (9).to_bytes(4, "little") + (8).to_bytes(4, "little")
    head += (4_000_000).to_bytes(8, "little")
    (target / "adapter.gguf").write_bytes(head + bytes(32_000_000))  # four million empty strings

    with pytest.raises(AdapterInvalidError) as caught:
        llama.verify(target)

    assert caught.value.error_code == "adapter_corrupt"
