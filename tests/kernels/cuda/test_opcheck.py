"""Operations as torch sees them on a GPU: schemas, aliases, fake tensors, tracing; more of them in test_lora and test_gemm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from node.kernels.attention.paged import AttentionShape

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

BF16, I32 = torch.bfloat16, torch.int32
check = torch.library.opcheck


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").to(BF16)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=I32, device="cuda")


@pytest.fixture
def work(make_work):
    return make_work([((0, 1.0),), (), ((1, 0.5), (0, 2.0))], [8, 16], 64, (128, 64, 64))


def test_norms_pass_opcheck(work):
    x, weight, embedding = random(3, 576), random(576), random(10, 576)
    check(torch.ops.openlora.rms_norm_into.default, (x, weight, 1e-5, 0, torch.zeros_like(x)))
    both = torch.zeros_like(x), torch.zeros_like(x)
    check(torch.ops.openlora.embed_rms_norm.default, (ints(3, 0, 9), None, embedding, weight, 1e-5, 0, *both))
    check(torch.ops.openlora.take_rows.default, (embedding, ints(3, 0, 9), 0, torch.zeros_like(x)))


@pytest.mark.parametrize("has_adapters", [False, True], ids=["base", "lora"])
def test_rope_kv_write_passes_opcheck(work, has_adapters):
    adapters = (None, None, None, None, [], 0)
    if has_adapters:
        v = torch.zeros(1, work.block.pair_count, 3, 16, device="cuda")
        adapters = (work.ops._pages, work.tiles.block, work.ops._ranks, v, list(work.span_tuple), work.tiles.tile_rows)
    angles = torch.randn(2, 20, 32, device="cuda")
    cache = torch.zeros(2, 1, 16, 1, 64, device="cuda").to(BF16)
    rows = (*angles, ints(4, 0, 19), ints(3, 7, -1), cache[0].clone(), cache[1].clone())
    y, q = torch.randn(2, 3, 256, device="cuda"), torch.zeros(3, 128, device="cuda").to(BF16)
    check(torch.ops.openlora.fused_rope_kv_write.default, (y, None, *adapters, *rows, None, None, 1e-6, 0, q))


def test_gemms_pass_opcheck(work):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    x, weight = random(3, 64), random(128, 64)
    planes = work.ops.skinny_gemm_planes(128, 64, 3)
    check(torch.ops.openlora.skinny_gemm.default, (x, weight, False, torch.zeros(planes, 3, 128, device="cuda")))
    check(torch.ops.openlora.skinny_gemm_silu_mul.default, (x, weight, False, random(3, 64)))


def test_attention_decode_passes_opcheck(work):
    pytest.importorskip("triton")
    from node.kernels.attention.native import LOG2_E, NativeAttention
    from node.kernels.attention.triton_backend import TritonAttention

    device = torch.device("cuda")
    shape = AttentionShape(8, 2, 64, 16, BF16, 0.125, max_batch=2, max_context=64, windows=(None,))
    native = NativeAttention(shape, device, TritonAttention(shape, device), has_follow=False)
    plan = native.plan_decode(torch.arange(8, dtype=I32, device="cuda").view(2, 4), ints(50, 3), 64)
    found, memory = plan.items[None], native._work
    cache, q = random(2, 8, 16, 2, 64), random(2, 8, 64)
    partial, stats = torch.zeros_like(memory.partial), torch.zeros_like(memory.stats)
    tables = (plan.block_tables, found.items, found.counts, partial, stats, memory.done)
    rest = (0.125 * LOG2_E, 0, plan.workers, native._variant(2).number, 0, torch.zeros_like(q))
    check(torch.ops.openlora.attention_decode.default, (q, cache[0].clone(), cache[1].clone(), *tables, *rest))
