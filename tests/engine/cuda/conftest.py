"""A small Llama of sizes that the GPU's kernels take, three adapters of it, and engines on the GPU and on the CPU."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

from node.kernels.build_cuda import cuda_library_path

VOCAB = 101


def pytest_collection_modifyitems(items):
    reason = ""
    if not torch.cuda.is_available():
        reason = "needs an NVIDIA GPU"
    elif cuda_library_path() is None:
        reason = "needs the CUDA kernels: python -m node.kernels.build"
    for item in items:
        if "engine/cuda" in str(item.fspath):
            item.add_marker(pytest.mark.cuda)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def world(tmp_path_factory, request):
    """In place of the CPU's world: heads of 64, every size a multiple of 32."""
    from dataclasses import make_dataclass

    root = tmp_path_factory.mktemp("gpu-world")
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).eval().save_pretrained(root / "model")
    Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0")).save(str(root / "model" / "tokenizer.json"))
    adapters = {}
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for name, rank, targets in (("x", 4, ["q_proj", "v_proj"]), ("y", 16, linear), ("z", 40, [*linear, "lm_head"])):
        peft = get_peft_model(
            LlamaForCausalLM.from_pretrained(root / "model"),
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM"),
        )
        generator = torch.Generator().manual_seed(rank)
        for parameter_name, parameter in peft.named_parameters():
            if "lora_" in parameter_name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        peft.save_pretrained(root / name)
        adapters[name] = root / name
    return make_dataclass("World", ["model_dir", "adapters"])(root / "model", adapters)


@pytest.fixture
def make_gpu(make_driver):
    """An engine on the GPU, small enough to be opened many times."""

    def make(**settings):
        options = {"kv_block_size": 16, "kv_cache_bytes": 8 << 20, "max_sequences": 16, "max_batch_tokens": 256, **settings}
        adapters = {"memory_bytes": 64 << 20, "host_memory_bytes": 64 << 20, **options.pop("adapters", {})}
        return make_driver(device="cuda", adapters=adapters, **options)

    return make


@pytest.fixture
def make_cpu(make_driver):
    """The same on the CPU."""

    def make(**settings):
        return make_driver(
            device="cpu", **{"kv_block_size": 16, "kv_cache_bytes": 8 << 20, "adapters": {"memory_bytes": 64 << 20}, **settings}
        )

    return make
