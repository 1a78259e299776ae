"""Rows with side tensors: the semantics written in `node.kernels.side`, and bits that depend on the row alone."""

from __future__ import annotations

import pytest
import torch

from node.kernels.layout import PageLayout
from node.kernels.lora import EmbeddingDelta, LoraPool, SideTensors, lora_rows
from node.kernels.ops import Kernels, lora_spans
from node.kernels.side import add_to_embedding, select_groups, side_linear, side_rows

HIDDEN, OUTPUTS, RANK = 40, 24, 3
PLAIN, DORA, BIASED = 0, 1, 2


@pytest.fixture(params=["reference", "cpp"])
def kernels(request):
    kernels = Kernels.load("reference" if request.param == "reference" else "auto", threads=2, is_deterministic=True)
    if request.param == "cpp" and kernels.name == "reference":
        pytest.skip("the C++ kernels are not built, or this CPU cannot run them")
    return kernels


class World:
    """Two modules side by side in one fused linear, and three adapters of both."""

    def __init__(self, kernels, dtype=torch.float32):
        generator = torch.Generator().manual_seed(3)

        def random(*shape):
            return torch.randn(shape, generator=generator)

        self.kernels, self.dtype = kernels, dtype
        layout = PageLayout([("q", HIDDEN, OUTPUTS), ("k", HIDDEN, OUTPUTS)], RANK)
        self.spans = lora_spans([(layout.spans["q"], 0), (layout.spans["k"], OUTPUTS)])
        self.weight, self.bias = random(2 * OUTPUTS, HIDDEN).to(dtype), random(2 * OUTPUTS).to(dtype)
        self.packed = kernels.pack_linear(self.weight)
        self.pool = LoraPool(
            pages=(0.3 * random(3, layout.page_elements)).to(dtype),
            slot_pages=torch.arange(3, dtype=torch.int32).unsqueeze(1),
            ranks=torch.full((2, 3), RANK, dtype=torch.int32),
            scales=torch.tensor([[0.5, 2.0, 1.0], [1.5, 0.25, 1.0]]),
            page_rank=RANK,
        )
        self.pool.sides[DORA] = SideTensors(gains={0: 0.5 * random(OUTPUTS), 1: 0.5 * random(OUTPUTS)})
        self.pool.sides[BIASED] = SideTensors(biases={1: random(OUTPUTS)})
        self.x = random(6, HIDDEN).to(dtype)

    def run(self, terms, x=None):
        """Every row with its own terms."""
        x = self.x if x is None else x
        counts = [1] * x.shape[0]
        rows = lora_rows(terms, counts)
        groups = side_rows(self.pool, [tuple(item) for item in terms], counts)
        if groups is not None:
            return side_linear(
                self.kernels, x, self.packed, self.bias, pool=self.pool, rows=rows, groups=groups, spans=self.spans
            )
        product = self.kernels.linear(x, self.packed, self.bias, pool=self.pool, rows=rows, spans=self.spans)
        return self.kernels.finish(product, self.dtype)

    def expected(self, row, terms):
        """The formula in float64, one row, one module after the other."""
        x, out = self.x[row].double(), []
        for index in range(2):
            columns = slice(index * OUTPUTS, (index + 1) * OUTPUTS)
            base = self.weight[columns].double() @ x
            y = base + self.bias[columns].double()
            for slot, weight in terms:
                _, a_offset, b_offset, inputs, outputs, _ = self.spans.table[index].tolist()
                page = self.pool.pages[slot].double()
                a = page[a_offset : a_offset + RANK * inputs].view(RANK, inputs)
                b = page[b_offset : b_offset + RANK * outputs].view(RANK, outputs)
                side = self.pool.sides.get(slot, SideTensors())
                y = y + weight * float(self.pool.scales[index, slot]) * (b.T @ (a @ x))
                if index in side.gains:
                    y = y + weight * side.gains[index].double() * base
                if index in side.biases:
                    y = y + weight * side.biases[index].double()
            out.append(y)
        return torch.cat(out)


TERMS = [
    [(PLAIN, 1.0)],
    [(DORA, 1.0)],
    [],
    [(DORA, 0.5), (PLAIN, -1.25)],
    [(BIASED, 2.0)],
    [(DORA, 1.0), (BIASED, 1.0)],
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rows_equal_the_formula(kernels, dtype, tolerance):
    world = World(kernels, dtype)

    y = world.run(TERMS)

    for row, terms in enumerate(TERMS):
        expected = world.expected(row, terms)
        assert (y[row].double() - expected).abs().max() / expected.abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_have_the_same_bits_alone_and_together(kernels, dtype):
    world = World(kernels, dtype)

    together = world.run(TERMS)

    for row, terms in enumerate(TERMS):
        assert torch.equal(world.run([terms], world.x[row : row + 1])[0], together[row])


def test_side_rows_without_such_adapters_is_nothing(kernels):
    pool = World(kernels).pool

    assert side_rows(pool, [((PLAIN, 1.0),), ()], [2, 1]) is None
    pool.sides.clear()
    assert side_rows(pool, [((DORA, 1.0),)], [1]) is None


def test_side_rows_group_by_recipe_and_follow_a_selection(kernels):
    pool = World(kernels).pool
    dora, both = ((DORA, 1.0),), ((DORA, 1.0), (PLAIN, 1.0))

    groups = side_rows(pool, [dora, ((PLAIN, 1.0),), both, dora], [2, 1, 1, 3])

    assert {group.terms: group.rows.tolist() for group in groups} == {dora: [0, 1, 4, 5, 6], both: [3]}
    selected = select_groups(groups, torch.tensor([1, 2, 6]))
    assert {group.terms: group.rows.tolist() for group in selected} == {dora: [0, 2]}
    assert select_groups(groups, torch.tensor([2])) is None


def test_embedding_rows_equal_the_formula(kernels):
    world = World(kernels)
    generator = torch.Generator().manual_seed(9)
    a, b = torch.randn(11, 4, generator=generator), torch.randn(HIDDEN, 4, generator=generator)
    gain = torch.randn(HIDDEN, generator=generator)
    world.pool.sides[DORA] = SideTensors(embedding=EmbeddingDelta(a, b, gain))
    world.pool.sides[BIASED] = SideTensors(embedding=EmbeddingDelta(b[:11], torch.eye(HIDDEN)[:, :4].contiguous(), None))
    ids = torch.tensor([3, 3, 10, 0, 1, 2])
    x = world.x.clone()
    groups = side_rows(world.pool, [tuple(terms) for terms in TERMS], [1] * 6)

    add_to_embedding(x, ids, world.pool, groups)

    for row, terms in enumerate(TERMS):
        expected = world.x[row].clone()
        for slot, weight in terms:
            delta = world.pool.sides[slot].embedding if slot in world.pool.sides else None
            if delta is not None:
                expected += weight * (delta.a[ids[row]] @ delta.b.T)
                expected += 0 if delta.gain is None else weight * delta.gain * world.x[row]
        assert torch.allclose(x[row], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacked_is_the_weight_that_was_packed(kernels, dtype):
    weight = torch.randn(45, 33, generator=torch.Generator().manual_seed(1)).to(dtype)

    packed = kernels.pack_linear(weight)

    assert torch.equal(packed.unpacked(), weight)
    for first, count in ((0, 45), (3, 40), (32, 13), (31, 2), (40, 5)):
        assert torch.equal(packed.unpacked(first, count), weight[first : first + count])
