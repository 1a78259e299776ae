"""A small Llama of sizes that the GPU's kernels take, three adapters of it, and engines on the GPU and on the CPU."""

from __future__ import annotations

import pytest
import torch

from node.kernels.build_cuda import cuda_library_path

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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
def world(build_world):
    """In place of the CPU's world: heads of 64, every size a multiple of 32."""
    return build_world(
        (("x", 4, ["q_proj", "v_proj"]), ("y", 16, LINEARS), ("z", 40, [*LINEARS, "lm_head"])),
        0.05,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        max_position_embeddings=512,
        initializer_range=0.1,
    )


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
