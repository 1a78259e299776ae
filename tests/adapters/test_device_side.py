"""Tensors beside an adapter's pages, in the pages that it is charged for them; plain memory stands for a GPU's."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from node.adapters.device_side import ALIGN_BYTES, SideRoom, page_locked
from node.kernels.lora import EmbeddingDelta, SideTensors

PAGE_BYTES = 4096


def sent(side, page_count):
    pages = torch.full((page_count, PAGE_BYTES // 2), 7.0, dtype=torch.bfloat16)
    return pages, SideRoom(list(pages)).send(side, pages.device)


def is_inside(tensor, pages):
    first = pages.data_ptr()
    return first <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= first + pages.nbytes


def test_everything_arrives_inside_the_pages():
    embedding = EmbeddingDelta(torch.randn(20, 4).bfloat16(), torch.randn(8, 4), torch.randn(8))
    side = SideTensors({3: torch.randn(100), 5: torch.randn(7)}, {3: torch.randn(100)}, embedding)
    pages, found = sent(side, 1)
    expected = [side.gains[3], side.gains[5], side.biases[3], embedding.a, embedding.b, embedding.gain]
    moved = [found.gains[3], found.gains[5], found.biases[3], found.embedding.a, found.embedding.b, found.embedding.gain]
    assert all(torch.equal(*pair) for pair in zip(moved, expected, strict=True))
    assert all(is_inside(tensor, pages) for tensor in moved)


def test_embedding_without_a_gain_keeps_none():
    _, found = sent(SideTensors(embedding=EmbeddingDelta(torch.ones(2, 1), torch.ones(2, 1), None)), 1)
    assert found.embedding.gain is None


@given(st.lists(st.integers(1, 700), max_size=12), st.integers(0, 3))
def test_no_two_tensors_share_a_byte_whatever_their_sizes(sizes, page_count):
    side = SideTensors({index: torch.full((size,), float(index)) for index, size in enumerate(sizes)})
    pages, found = sent(side, page_count)
    for index, size in enumerate(sizes):
        assert torch.equal(found.gains[index], torch.full((size,), float(index)))
    if sum(-(-4 * size // ALIGN_BYTES) * ALIGN_BYTES for size in sizes) <= PAGE_BYTES * min(page_count, 1):
        assert all(is_inside(found.gains[index], pages) for index in range(len(sizes)))


def test_page_locked_tensors_are_one_piece_of_the_size_they_need():
    embedding = EmbeddingDelta(torch.randn(20, 4).bfloat16(), torch.randn(8, 4), torch.randn(8))
    side = SideTensors({3: torch.randn(100)}, {5: torch.randn(7)}, embedding)
    pieces = []

    def allocate(size):
        pieces.append(torch.zeros(size, dtype=torch.uint8))
        return pieces[-1]

    found = page_locked(side, allocate)
    assert torch.equal(found.gains[3], side.gains[3])
    assert torch.equal(found.embedding.a, embedding.a)
    assert all(is_inside(tensor, pieces[0]) for tensor in (found.gains[3], found.biases[5], found.embedding.gain))
    assert pieces[0].numel() % ALIGN_BYTES == 0
