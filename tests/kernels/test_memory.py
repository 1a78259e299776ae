"""Huge-page tensors are ordinary tensors: right shape, zero, apart from each other, alive as long as they are used."""

import gc

import torch

from node.kernels.memory import CHUNK_BYTES, WeightArena, empty_huge


def test_empty_huge_is_zero_and_contiguous():
    tensor = empty_huge((3, 5, 7), torch.bfloat16)
    assert tensor.shape == (3, 5, 7)
    assert tensor.is_contiguous()
    assert not tensor.any()


def test_empty_huge_no_elements_has_the_shape():
    assert empty_huge((0, 4), torch.float32).shape == (0, 4)


def test_weight_arena_copies_survive_the_arena():
    arena = WeightArena()
    sources = [
        torch.randn(100, 77),
        torch.randn(9).bfloat16(),
        torch.randn(CHUNK_BYTES // 4 + 1),
        torch.randn(3, 3),
        torch.empty(0),
    ]
    copies = [arena.copy(source) for source in sources]
    del arena
    gc.collect()
    assert all(torch.equal(copy, source) for copy, source in zip(copies, sources, strict=True))
    assert all(copy.dtype == source.dtype for copy, source in zip(copies, sources, strict=True))
