"""The LoRA shrink in the skinny GEMM's launch, on a Hopper GPU, against float64: ranks, recipes, bits, what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from node.kernels.cuda_ops import Follow


def _has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not _has_hopper(), reason="needs a GPU of compute capability 9.0")]

RANKS = [1, 8, 16, 24, 64]
SLOTS = 64  # more tasks a block than its ring has stages
BF16 = torch.bfloat16
ONE, TWO, THREE = (256,), (192, 192), (128, 64, 64)
KINDS = [(), ((0, 1.0),), ((3, 0.5), (1, -1.25)), ((4, 1.0),), ((2, 2.0), (0, 0.25), (3, 1.0)), ((1, 1.0),)]


def _terms(rows):
    """Rows without adapters, with one, with two and three, some recipes shared; the first one has rank 64."""
    return [((4, 1.0),), *[KINDS[(row * 7 + row // 5) % len(KINDS)] for row in range(rows - 1)]]


@dataclass
class Launch:
    """One linear with its adapters, and the memory of its launches."""

    work: object
    weight: Tensor
    y: Tensor
    v: Tensor

    @classmethod
    def of(cls, work, rows, inputs, weight=None) -> Launch:
        weight = torch.randn(work.columns, inputs, device="cuda").to(BF16) if weight is None else weight
        planes = work.ops.skinny_gemm_planes(work.columns, inputs, rows)
        y = torch.empty(planes, rows, work.columns, device="cuda")
        return cls(work, weight, y, work.poisoned_v(work.ops.shrink_chunks(inputs)))

    def poison(self) -> None:
        self.y.fill_(float("nan"))
        self.v.fill_(float("nan"))

    @property
    def sum(self) -> Tensor:
        return self.v.double().sum(0)

    def run(self, x, follow=Follow.PLAIN) -> None:
        work = self.work
        work.ops.skinny_gemm_shrink(x, self.weight, work.tiles, work.span_tuple, self.v, self.y, follow)


def _launched(make_work, terms, inputs, outputs, x, **rest) -> Launch:
    work = make_work(terms, RANKS, inputs, outputs, **rest)
    launch = Launch.of(work, len(x), inputs)
    launch.poison()
    launch.run(x)
    return launch


@pytest.mark.parametrize("outputs", [ONE, TWO, THREE], ids=["o", "gate_up", "qkv"])
@pytest.mark.parametrize(
    ("rows", "inputs"),
    [(1, 64), (1, 4096), (5, 576), (16, 4096), (33, 1536), (64, 3584), (100, 576), (192, 1088), (256, 64), (256, 4096)],
)
def test_shrink_of_mixed_ranks_and_recipes_equals_float64_beside_the_product(make_work, error_of, outputs, inputs, rows):
    x = torch.randn(rows, inputs, device="cuda").to(BF16)
    launch = _launched(make_work, _terms(rows), inputs, outputs, x)
    reference = launch.work.shrink_reference(x)
    v = launch.sum[: len(reference)]
    assert error_of(v, reference) < 1e-4
    assert bool((v.cpu()[reference == 0] == 0).all())
    assert bool(launch.sum[len(reference) :].isnan().all())
    assert error_of(launch.y.double().sum(0), x.double() @ launch.weight.double().t()) < 1e-4


@pytest.mark.parametrize(("distinct", "rank"), [(1, 16), (8, 64), (SLOTS, 16), (SLOTS, 40)])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, (4096, 1024, 1024)), (4096, (4096,)), (1024, (14336, 14336))])
def test_shrink_of_a_layer_with_distinct_adapters_equals_float64(make_work, error_of, inputs, outputs, distinct, rank):
    x = torch.randn(64, inputs, device="cuda").to(BF16)
    work = make_work([((row % distinct, 1.0),) for row in range(64)], [rank] * distinct, inputs, outputs)
    launch, pairs = Launch.of(work, 64, inputs), work.block.pair_count
    for _ in range(2):  # the second launch finds what the first left
        launch.poison()
        launch.run(x)
        assert error_of(launch.sum[:pairs], work.shrink_reference(x)) < 1e-4
        assert error_of(launch.y.double().sum(0), x.double() @ launch.weight.double().t()) < 1e-4


def test_modules_that_an_adapter_does_not_touch_get_zeros(make_work, error_of):
    ranks = [[16, 0, 24], [0, 0, 8], [40, 16, 0]]
    work = make_work([((0, 1.0),), ((1, 1.0), (2, 0.5)), ((2, 1.0),)], ranks, 576, THREE)
    launch, x = Launch.of(work, 3, 576), torch.randn(3, 576, device="cuda").to(BF16)
    launch.poison()
    launch.run(x)
    reference = work.shrink_reference(x)
    assert error_of(launch.sum[: len(reference)], reference) < 1e-4
    assert bool((launch.sum[: len(reference)].cpu()[reference == 0] == 0).all())


def test_shrink_of_a_strided_x_equals_float64(make_work, error_of):
    x = torch.randn(40, 1024, device="cuda").to(BF16)[:, 256:768]
    launch = _launched(make_work, _terms(40), 512, THREE, x)
    reference = launch.work.shrink_reference(x)
    assert error_of(launch.sum[: len(reference)], reference) < 1e-4


def test_product_without_adapters_writes_no_v(make_work):
    x = torch.randn(7, 576, device="cuda").to(BF16)
    launch = _launched(make_work, [()] * 7, 576, ONE, x)
    assert bool(launch.v.isnan().all())
    assert bool(launch.y.isfinite().all())


@pytest.mark.parametrize("inputs", [576, 2112, 4096])
def test_shrink_of_a_row_has_the_same_bits_alone_and_in_any_batch(make_work, inputs):
    terms, x = _terms(256), torch.randn(256, inputs, device="cuda").to(BF16)
    whole = _launched(make_work, terms, inputs, THREE, x)
    pool, weight = whole.work.pool, whole.weight

    def found(rows):
        work = make_work([terms[row] for row in rows], RANKS, inputs, THREE, pool=pool)
        launch = Launch.of(work, len(rows), inputs, weight)
        launch.poison()
        launch.run(x[rows].contiguous())
        return launch.y, _delta(launch)

    wanted = whole.y, _delta(whole)
    for rows in ([0], [1], [100], [255], [3, 77, 4, 200, 18, 19, 20, 21, 22, 23, 24], list(range(64))):
        y, delta = found(rows)
        assert torch.equal(y, wanted[0][:, rows])
        assert torch.equal(delta, wanted[1][rows])


def _delta(launch) -> Tensor:
    """What the adapters add: a product of zeros, finished."""
    rows = launch.y.shape[1]
    out = torch.full((rows, launch.work.columns), float("nan"), device="cuda")
    zeros = torch.zeros(1, rows, launch.work.columns, device="cuda")
    launch.work.ops.materialize(launch.work.product(zeros, launch.v), out, Follow.PLAIN)
    assert bool(out.isfinite().all())
    return out


def test_product_has_the_bits_of_the_one_without_a_shrink(make_work):
    x = torch.randn(64, 4096, device="cuda").to(BF16)
    launch = _launched(make_work, _terms(64), 4096, (1024,), x)
    y = torch.full_like(launch.y, float("nan"))
    launch.work.ops.skinny_gemm(x, launch.weight, y, Follow.PLAIN)
    assert torch.equal(launch.y, y)


def test_dependent_launches_in_a_graph_read_what_was_written_before_them(make_work):
    """x is made anew before each product, and all of them share one v."""
    rows, inputs, count = 64, 4096, 6
    work = make_work(_terms(rows), RANKS, inputs, (1024,))
    launch = Launch.of(work, rows, inputs)
    raw = torch.randn(count, rows, inputs, device="cuda").to(BF16)
    norm, x = torch.ones(inputs, device="cuda").to(BF16), torch.empty(rows, inputs, device="cuda").to(BF16)
    outs = torch.empty(count, rows, 1024, device="cuda")

    def run(follow):
        for i in range(count):
            work.ops.rms_norm(raw[i], norm, 1e-5, x, follow)
            launch.run(x, follow)
            work.ops.materialize(work.product(launch.y, launch.v), outs[i], follow)

    run(Follow.PLAIN)
    wanted = outs.clone()
    assert bool(wanted.isfinite().all())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(Follow.WAIT_FIRST)
    for _ in range(30):
        outs.fill_(float("nan"))
        launch.poison()
        graph.replay()
        assert torch.equal(outs, wanted)


def test_long_rows_have_no_chunks(make_work):
    ops = make_work([()], RANKS, 64, ONE).ops
    assert [ops.shrink_chunks(inputs) for inputs in (64, 512, 576, 4096, 4160, 14336)] == [1, 1, 2, 8, 0, 0]


def test_operation_passes_opcheck(make_work):
    x = torch.randn(8, 576, device="cuda").to(BF16)
    launch = _launched(make_work, _terms(8), 576, THREE, x)
    launch.y.zero_(), launch.v.zero_()
    ops, work = launch.work.ops, launch.work
    adapters = (ops._pages, work.tiles.block, ops._ranks, ops._scales, list(work.span_tuple), 16)
    arguments = (x, launch.weight, False, *adapters, launch.v, launch.y)
    torch.library.opcheck(torch.ops.openlora.skinny_gemm_shrink.default, arguments)


def test_wrong_arguments_say_what_is_wrong(make_work):
    x = torch.randn(8, 576, device="cuda").to(BF16)
    launch = _launched(make_work, _terms(8), 576, THREE, x)
    launch.v = launch.v[:1]
    with pytest.raises(RuntimeError, match="v has size 1 in dimension 0, wanted 2"):
        launch.run(x)
    wide = make_work(_terms(40), RANKS, 576, THREE, tile_rows=64)
    with pytest.raises(RuntimeError, match="could not be launched"):
        Launch.of(wide, 40, 576).run(torch.randn(40, 576, device="cuda").to(BF16))
