"""Pages never overlap, and rows list their terms in order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.kernels.layout import PageLayout
from node.kernels.linear import SPAN_FIELDS, lora_spans
from node.kernels.lora import lora_rows

SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)


@given(SHAPES, st.integers(1, 16))
def test_page_layout_modules_tile_the_page_exactly(shapes, page_rank):
    layout = PageLayout([(f"m{i}", a, b) for i, (a, b) in enumerate(shapes)], page_rank)
    end = 0
    for span in layout.spans.values():
        assert span.a_offset == end
        assert span.b_offset == end + page_rank * span.in_features
        end = span.b_offset + page_rank * span.out_features
    assert layout.page_elements == end


@given(st.integers(1, 300), st.integers(1, 16))
def test_pages_for_rank_are_just_enough(rank, page_rank):
    pages = PageLayout([("m", 1, 1)], page_rank).pages_for_rank(rank)
    assert (pages - 1) * page_rank < rank <= pages * page_rank


def test_page_layout_rank_zero_is_refused():
    with pytest.raises(ValueError, match="page_rank is 0"):
        PageLayout([], 0)


def test_lora_rows_repeats_a_sequences_terms_for_each_row():
    rows = lora_rows([((3, 0.5), (1, 2.0)), (), ((2, 1.0),)], [2, 1, 1])
    assert rows is not None
    assert rows.row_start.tolist() == [0, 2, 4, 4, 5]
    assert rows.slot.tolist() == [3, 1, 3, 1, 2]
    assert rows.weight.tolist() == [0.5, 2.0, 0.5, 2.0, 1.0]


def test_lora_rows_without_adapters_is_none():
    assert lora_rows([(), ()], [1, 5]) is None


def test_lora_spans_keep_the_order_of_modules():
    layout = PageLayout([("q", 4, 6), ("k", 4, 2)], 8)
    table = lora_spans([(layout.spans["k"], 6), (layout.spans["q"], 0)]).table
    assert table.shape == (2, SPAN_FIELDS)
    assert table[0].tolist() == [1, 80, 112, 4, 2, 6]


def test_half_of_a_page_ends_with_the_modules_of_the_first_layers():
    names = [f"model.layers.{layer}.{module}" for layer in range(5) for module in ("a", "b")]
    layout = PageLayout([*((name, 6, 4) for name in names), ("lm_head", 6, 9)], 8)
    assert layout.half() == layout.spans["model.layers.2.a"].a_offset == 4 * 8 * 10


@pytest.mark.parametrize(
    "names", [["m0", "m1"], ["layers.1.a", "layers.0.a"], ["lm_head", "layers.0.a", "layers.1.a"], ["layers.0.a"]]
)
def test_page_without_an_order_of_layers_has_no_half(names):
    assert PageLayout([(name, 6, 4) for name in names], 8).half() is None
