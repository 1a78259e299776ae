"""Paged attention against float64, and its independence from chunks, batches, blocks and threads."""

import pytest
import torch

from node.kernels import reference
from node.kernels.ops import Kernels


class Sequences:
    """Sequences with (context, query rows) over a cache whose unwritten places are NaN."""

    def __init__(self, shapes, heads, groups, size, block, dtype):
        self.scale, self.shapes = size**-0.5, shapes
        needed = [-(-context // block) for context, _ in shapes]
        order = torch.randperm(sum(needed) + 1).tolist()
        self.keys = torch.full((sum(needed) + 1, groups, block, size), float("nan")).to(dtype)
        self.values = self.keys.clone()
        self.tables = torch.zeros(len(shapes), max(needed) + 1, dtype=torch.int32)
        for s, (context, _) in enumerate(shapes):
            self.tables[s, : needed[s]] = torch.tensor([order.pop() for _ in range(needed[s])])
            for position in range(context):
                place = self.tables[s, position // block]
                self.keys[place, :, position % block] = torch.randn(groups, size).to(dtype)
                self.values[place, :, position % block] = torch.randn(groups, size).to(dtype)
        self.lengths = torch.tensor([context for context, _ in shapes], dtype=torch.int32)
        counts = torch.tensor([0] + [rows for _, rows in shapes])
        self.starts = counts.cumsum(0).to(torch.int32)
        self.q = torch.randn(int(self.starts[-1]), heads * size).to(dtype)

    def run(self, kernels, window=None):
        return kernels.paged_attention(self.q, self.keys, self.values, self.tables, self.starts, self.lengths, self.scale, window)

    def expected(self, window=None):
        wide = (self.q.double(), self.keys.double(), self.values.double())
        return reference.paged_attention(*wide, self.tables, self.starts, self.lengths, self.scale, window)

    def part(self, kernels, sequence, begin, end, window=None):
        """Rows begin..end of one sequence alone, as if they were a chunk."""
        context, rows = self.shapes[sequence]
        q = self.q[self.starts[sequence] + begin : self.starts[sequence] + end]
        length = torch.tensor([context - rows + end], dtype=torch.int32)
        starts = torch.tensor([0, end - begin], dtype=torch.int32)
        tables = self.tables[sequence : sequence + 1]
        return kernels.paged_attention(q, self.keys, self.values, tables, starts, length, self.scale, window)


MIXED = [(1, 1), (70, 1), (129, 129), (200, 37), (65, 2), (64, 64)]


@pytest.mark.parametrize(("heads", "groups", "size"), [(9, 3, 64), (4, 4, 16), (6, 2, 12), (4, 1, 128), (28, 1, 8), (2, 1, 6)])
@pytest.mark.parametrize("window", [None, 5, 100])
def test_attention_mixed_batch_matches_float64(kernels, dtype, heads, groups, size, window):
    batch = Sequences(MIXED, heads, groups, size, 16, dtype)
    actual, expected = batch.run(kernels, window), batch.expected(window)
    assert torch.isfinite(actual).all()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-5
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("window", [None, 50])
def test_attention_any_chunking_has_the_same_bits(kernels, dtype, window):
    batch = Sequences([(150, 150), (90, 3), (33, 1)], 9, 3, 64, 16, dtype)
    whole = batch.run(kernels, window)
    for begin, end in ((0, 1), (0, 150), (5, 70), (70, 71), (149, 150), (100, 150)):
        assert torch.equal(batch.part(kernels, 0, begin, end, window), whole[begin:end])
    assert torch.equal(batch.part(kernels, 2, 0, 1, window), whole[-1:])


def test_attention_any_thread_count_has_the_same_bits(best, dtype):
    batch = Sequences(MIXED, 9, 3, 64, 16, dtype)
    one, four = (batch.run(Kernels.load("cpp", threads=count)) for count in (1, 4))
    assert torch.equal(one, batch.run(best))
    assert torch.equal(one, four)


def test_attention_block_outside_the_cache_is_refused(best):
    batch = Sequences([(20, 1)], 2, 1, 8, 16, torch.float32)
    batch.tables[0, 1] = 77
    with pytest.raises(RuntimeError, match="names block 77"):
        batch.run(best)


@pytest.mark.parametrize("window", [None, 50])
def test_attention_of_the_deterministic_reference_has_the_same_bits_in_any_chunk(dtype, window):
    batch = Sequences([(150, 150), (90, 3), (33, 1)], 9, 3, 64, 16, dtype)
    kernels = Kernels.load("reference", is_deterministic=True)
    whole = batch.run(kernels, window)
    assert (whole.double() - batch.expected(window)).abs().max() <= (1e-2 if dtype == torch.bfloat16 else 1e-6)
    for begin, end in ((0, 1), (0, 150), (5, 70), (70, 71), (149, 150), (100, 150)):
        assert torch.equal(batch.part(kernels, 0, begin, end, window), whole[begin:end])
