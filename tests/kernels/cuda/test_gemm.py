"""The skinny GEMM on a Hopper GPU, against float64, with fresh inputs and poisoned outputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from node.engine.device_sampler import DeviceSampler
from node.kernels.build_cuda import build_cuda
from node.kernels.cuda_ops import CudaOps, Follow
from node.kernels.head_rows import LogitTops


def _has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not _has_hopper(), reason="needs a GPU of compute capability 9.0")]

LAYER_SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]
SMALL_SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576), (8, 64), (72, 128), (1000, 640)]
TOKENS = [1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 96, 100, 128, 129, 160, 161, 192, 193, 224, 250, 256, 257, 287, 288, 289, 320]
LOGIT_TOKENS = [tokens for tokens in TOKENS if tokens <= 256]


@pytest.fixture(scope="module")
def ops() -> CudaOps:
    build_cuda()
    return CudaOps()


def _random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda").to(torch.bfloat16)


def _planes(ops: CudaOps, x: Tensor, weight: Tensor, follow: Follow = Follow.PLAIN) -> Tensor:
    tokens, outputs = len(x), len(weight)
    count = ops.skinny_gemm_planes(outputs, x.shape[1], tokens)
    y = torch.full((count, tokens, outputs), float("nan"), device="cuda")
    ops.skinny_gemm(x, weight, y, follow)
    return y


def _error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """max|difference| / max|reference|; NaN stays NaN, which is under no limit."""
    reference = x.double() @ weight.double().t()
    return float((y.double().sum(0) - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize(("outputs", "inputs"), SMALL_SHAPES)
def test_planes_of_small_matrices_sum_to_the_product(ops, outputs, inputs):
    for tokens in TOKENS:
        x, weight = _random(tokens, inputs), _random(outputs, inputs)
        assert _error(_planes(ops, x, weight), x, weight) < 1e-4, tokens


@pytest.mark.parametrize("tokens", [1, 16, 64, 128, 256, 288, 320])
@pytest.mark.parametrize(("outputs", "inputs"), LAYER_SHAPES)
def test_planes_of_a_layer_sum_to_the_product(ops, outputs, inputs, tokens):
    x, weight = _random(tokens, inputs), _random(outputs, inputs)
    assert _error(_planes(ops, x, weight), x, weight) < 1e-4


@pytest.mark.parametrize("tokens", [1, 16, 33, 64, 100, 192, 256, 288, 311])
@pytest.mark.parametrize(("outputs", "inputs"), [(28672, 4096), (4096, 4096), (960, 576), (1000, 640)])
def test_bfloat16_planes_are_the_planes_rounded_once(ops, outputs, inputs, tokens):
    x, weight = _random(tokens, inputs), _random(outputs, inputs)
    expected = _planes(ops, x, weight).to(torch.bfloat16)
    y = torch.full_like(expected, float("nan"))
    ops.skinny_gemm(x, weight, y, Follow.PLAIN)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("outputs", "inputs"), [(28672, 4096), (17024, 64)])
def test_silu_mul_is_that_of_the_plane(ops, outputs, inputs, tokens):
    x, weight = _random(tokens, inputs), _random(outputs, inputs) / inputs**0.5
    gate, up = _planes(ops, x, weight)[0].double().chunk(2, dim=1)
    out = torch.full((tokens, outputs // 2), float("nan"), device="cuda", dtype=torch.bfloat16)
    ops.skinny_gemm_silu_mul(x, weight, out, Follow.PLAIN)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=2**-8)


@pytest.mark.parametrize(("outputs", "inputs"), [(28672, 4096), (17008, 64), (28672, 192)])
def test_silu_mul_has_the_same_bits_in_every_batch(ops, outputs, inputs):
    x, weight = _random(320, inputs), _random(outputs, inputs) / inputs**0.5
    alone = torch.full((320, outputs // 2), float("nan"), device="cuda", dtype=torch.bfloat16)
    for first in range(0, 320, 64):
        ops.skinny_gemm_silu_mul(x[first : first + 64], weight, alone[first : first + 64], Follow.PLAIN)
    for tokens in (129, 192, 193, 200, 249, 256, 257, 288, 289, 320):
        out = torch.full_like(alone[:tokens], float("nan"))
        ops.skinny_gemm_silu_mul(x[:tokens], weight, out, Follow.PLAIN)
        assert torch.equal(out, alone[:tokens]), tokens


def test_silu_mul_of_more_than_one_plane_is_refused(ops):
    x, weight = _random(1, 4096), _random(4096, 4096)
    with pytest.raises(RuntimeError, match="skinny_gemm_silu_mul cannot run"):
        ops.skinny_gemm_silu_mul(x, weight, torch.empty(1, 2048, device="cuda", dtype=torch.bfloat16), Follow.PLAIN)


@pytest.mark.parametrize(("outputs", "inputs"), [(960, 576), (576, 1536), *LAYER_SHAPES])
def test_rows_have_the_same_bits_in_every_batch(ops, outputs, inputs):
    x, weight = _random(320, inputs), _random(outputs, inputs)
    whole = _planes(ops, x, weight)
    for tokens in TOKENS:
        assert torch.equal(_planes(ops, x[:tokens].contiguous(), weight), whole[:, :tokens]), tokens


def test_row_has_the_same_bits_at_every_place(ops):
    x, weight = _random(1, 4096), _random(4096, 4096)
    many = _planes(ops, x.expand(200, 4096).contiguous(), weight)
    assert torch.equal(many, _planes(ops, x, weight).expand_as(many))


def test_dependent_launches_in_a_graph_see_each_others_results(ops):
    """x of every launch is written by the one before it, the situation a launch that starts too early would get wrong."""
    weights = [_random(4096, 4096) / 64 for _ in range(8)]
    first = _random(64, 4096)
    x = torch.empty_like(first)
    y = torch.empty(ops.skinny_gemm_planes(4096, 4096, 64), 64, 4096, device="cuda")

    def chain(follow: Follow) -> Tensor:
        x.copy_(first)
        for weight in weights:
            ops.skinny_gemm(x, weight, y, follow)
            x.copy_(y.sum(0))
        return x.clone()

    expected = chain(Follow.PLAIN)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain(Follow.WAIT_FIRST)
    for _ in range(3):
        result.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result, expected)


@pytest.mark.parametrize("tokens", [1, 7, 33, 100, 256, 275, 320])
@pytest.mark.parametrize(("outputs", "inputs"), [(72, 128), (1000, 640), (28672, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_outside_the_output_is_written(ops, dtype, outputs, inputs, tokens):
    x, weight, margin = _random(tokens, inputs), _random(outputs, inputs), 4096
    planes = ops.skinny_gemm_planes(outputs, inputs, tokens)
    for shape, launch in (
        ((planes, tokens, outputs), ops.skinny_gemm),
        ((tokens, outputs // 2), ops.skinny_gemm_silu_mul),
    ):
        if len(shape) == 2 and (dtype == torch.float32 or planes > 1 or outputs % 16):
            continue
        buffer = torch.full((2 * margin + math.prod(shape),), float("nan"), device="cuda", dtype=dtype)
        y = buffer[margin:-margin].view(shape)
        launch(x, weight, y, Follow.PLAIN)
        assert y.isfinite().all()
        assert buffer[:margin].isnan().all()
        assert buffer[-margin:].isnan().all()


def _ties(x: Tensor, weight: Tensor) -> None:
    weight.copy_(weight[torch.randint(0, 5, (len(weight),), device="cuda")])


def _some_nan(x: Tensor, weight: Tensor) -> None:
    x[:: 1 + len(x) // 3, 0] = float("nan")


def _nan_in_one_column(x: Tensor, weight: Tensor) -> None:
    weight[len(weight) // 2, 3] = float("nan")


def _infinite(x: Tensor, weight: Tensor) -> None:
    x[::2, 0] = float("inf")


def _minus_infinity_everywhere(x: Tensor, weight: Tensor) -> None:
    weight[:, 0] = 1
    x[::2, 0] = -float("inf")


def _zero(x: Tensor, weight: Tensor) -> None:
    x.zero_()


INPUTS = [lambda x, weight: None, _ties, _some_nan, _nan_in_one_column, _infinite, _minus_infinity_everywhere, _zero]


@pytest.mark.parametrize("change", INPUTS)
@pytest.mark.parametrize(("outputs", "inputs"), [(8, 64), (72, 128), (17024, 64), (26392, 192), (49152, 576), (128256, 4096)])
def test_logits_are_written_where_wanted_and_their_largest_found_everywhere(ops, outputs, inputs, change):
    for tokens in LOGIT_TOKENS if outputs < 30000 else (1, 8, 33, 96, 192, 256):
        x, weight = _random(tokens, inputs), _random(outputs, inputs)
        change(x, weight)
        expected = _planes(ops, x, weight)[0]
        wanted = (torch.rand(tokens, device="cuda") < 0.3).int()
        y = torch.full_like(expected, 7.5)
        parts = torch.full((tokens, ops.skinny_gemm_parts(outputs, inputs), 2), -99, device="cuda", dtype=torch.int32)
        ops.skinny_gemm_logits(x, weight, wanted, y, parts)
        rows = wanted.bool()
        assert torch.equal(y[rows].view(torch.int32), expected[rows].view(torch.int32))
        assert (y[~rows] == 7.5).all()
        sampler = DeviceSampler(outputs, tokens, torch.device("cuda"))
        found, of_logits = sampler.new_choice(tokens), sampler.new_choice(tokens)
        sampler.greedy(y, found, LogitTops(wanted, parts))
        sampler.greedy(expected, of_logits)
        assert torch.equal(found.tokens, of_logits.tokens), tokens
        assert torch.equal(found.answers, of_logits.answers), tokens


def test_logits_pass_opcheck(ops):
    x, weight, wanted = _random(3, 64), _random(72, 64), torch.ones(3, device="cuda", dtype=torch.int32)
    parts = torch.zeros(3, ops.skinny_gemm_parts(72, 64), 2, device="cuda", dtype=torch.int32)
    arguments = (x, weight, wanted, False, torch.zeros(3, 72, device="cuda"), parts)
    torch.library.opcheck(torch.ops.openlora.skinny_gemm_logits.default, arguments)


def test_logits_of_more_than_one_plane_are_refused(ops):
    x, weight, wanted = _random(1, 4096), _random(4096, 4096), torch.ones(1, device="cuda", dtype=torch.int32)
    parts = torch.empty(1, ops.skinny_gemm_parts(4096, 4096), 2, device="cuda", dtype=torch.int32)
    with pytest.raises(RuntimeError, match="skinny_gemm_logits cannot run"):
        ops.skinny_gemm_logits(x, weight, wanted, torch.empty(1, 4096, device="cuda"), parts)


@pytest.mark.parametrize(("outputs", "inputs"), [(100, 64), (64, 96)])
def test_planes_of_a_shape_it_cannot_run_are_none(ops, outputs, inputs):
    assert ops.skinny_gemm_planes(outputs, inputs, 8) == 0


def test_planes_beyond_its_tokens_are_none(ops):
    assert ops.skinny_gemm_planes(4096, 4096, 321) == 0
