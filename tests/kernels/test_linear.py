"""Base and adapted linears against float64, and their promise that a row's bits never depend on its batch."""

import pytest
import torch

from node.kernels import reference
from node.kernels.ops import Kernels

SHAPES = [(1, 576, 960), (3, 64, 33), (16, 1536, 576), (9, 7, 5), (70, 96, 130), (300, 64, 48)]
RANKS = [1, 4, 8, 20, 64]


def _close(actual, expected, dtype):
    tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-5
    scale = expected.abs().max().item()
    assert torch.isfinite(actual).all()
    assert (actual.double() - expected).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_random_inputs_match_float64(kernels, dtype, shape, has_bias):
    rows, inputs, outputs = shape
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if has_bias else None
    actual = kernels.linear(x, kernels.pack_linear(weight), bias)
    expected = reference.linear(x.double(), weight.double(), None if bias is None else bias.double(), torch.float64)
    assert actual.dtype == dtype
    _close(actual, expected, dtype)


def test_linear_float_output_keeps_float32_sums(kernels):
    x, weight = torch.randn(4, 576).bfloat16(), torch.randn(100, 576).bfloat16()
    actual = kernels.linear(x, kernels.pack_linear(weight), out_dtype=torch.float32)
    assert actual.dtype == torch.float32
    _close(actual, x.double() @ weight.double().T, torch.float32)


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 65])
def test_linear_rows_in_any_batch_have_the_same_bits(kernels, dtype, rows):
    x, weight = torch.randn(rows, 160).to(dtype), torch.randn(70, 160).to(dtype)
    packed = kernels.pack_linear(weight)
    batch = kernels.linear(x, packed)
    alone = torch.cat([kernels.linear(x[i : i + 1], packed) for i in range(rows)])
    assert torch.equal(batch, alone)


def test_linear_any_thread_count_has_the_same_bits(best, dtype):
    x, packed = torch.randn(33, 576).to(dtype), best.pack_linear(torch.randn(960, 576).to(dtype))
    one, five = (Kernels.load("cpp", threads=count).linear(x, packed) for count in (1, 5))
    assert torch.equal(one, best.linear(x, packed))
    assert torch.equal(one, five)


def test_linear_no_rows_returns_no_rows(kernels, dtype):
    packed = kernels.pack_linear(torch.randn(40, 8).to(dtype))
    assert kernels.linear(torch.empty(0, 8, dtype=dtype), packed).shape == (0, 40)


def test_linear_wrong_inputs_are_refused(best):
    packed = best.pack_linear(torch.randn(40, 8))
    with pytest.raises(RuntimeError, match="does not fit"):
        best.linear(torch.randn(2, 9), packed)


def _mixed_terms(rows, slots):
    """Rows with no, one and several weighted adapters."""
    kinds = [(), ((0, 1.0),), ((1, 0.5), (2, -0.25)), ((4, 1.0),), ((3, 0.3), (0, 0.3), (4, 0.4))]
    return [tuple((slot % slots, weight) for slot, weight in kinds[i % len(kinds)]) for i in range(rows)]


@pytest.mark.parametrize("page_dtype", [torch.float32, torch.bfloat16], ids=["pages_f32", "pages_bf16"])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 64, (32, 32)), (17, 96, (64, 16, 16)), (5, 30, (7, 50)), (90, 64, (96,))]
)
def test_lora_linear_mixed_ranks_match_float64(kernels, dtype, make_adapters, page_dtype, rows, inputs, outputs):
    adapters = make_adapters(RANKS, inputs, outputs, page_dtype)
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(adapters.outputs, inputs).to(dtype)
    terms = adapters.rows(_mixed_terms(rows, len(RANKS)) if rows > 1 else [((4, 1.5), (0, 1.0))])
    actual = kernels.linear(x, kernels.pack_linear(weight), pool=adapters.pool, rows=terms, spans=adapters.spans)
    delta = reference.lora_delta(x.double(), adapters.pool, terms, adapters.spans.table, adapters.outputs)
    assert delta.abs().max() > 0.1
    _close(actual, x.double() @ weight.double().T + delta, dtype)


def test_lora_linear_rank_zero_module_is_untouched(kernels, dtype, make_adapters):
    adapters = make_adapters([8, 4], 64, (32, 32), dtype)
    adapters.pool.ranks[1, 0] = 0
    x, packed = torch.randn(6, 64).to(dtype), kernels.pack_linear(torch.randn(64, 64).to(dtype))
    terms = adapters.rows([((0, 1.0),)] * 6)
    actual = kernels.linear(x, packed, pool=adapters.pool, rows=terms, spans=adapters.spans)
    base = kernels.linear(x, packed)
    assert torch.equal(actual[:, 32:], base[:, 32:])
    assert not torch.equal(actual[:, :32], base[:, :32])


@pytest.mark.parametrize("page_dtype", [torch.float32, torch.bfloat16], ids=["pages_f32", "pages_bf16"])
def test_lora_linear_rows_in_any_batch_have_the_same_bits(kernels, dtype, make_adapters, page_dtype):
    adapters = make_adapters(RANKS, 160, (64, 33), page_dtype)
    x, packed = torch.randn(256, 160).to(dtype), kernels.pack_linear(torch.randn(97, 160).to(dtype))
    terms = _mixed_terms(256, len(RANKS))
    batch = kernels.linear(x, packed, pool=adapters.pool, rows=adapters.rows(terms), spans=adapters.spans)
    for i in (1, 2, 3, 4, 128, 199, 253):
        alone = kernels.linear(x[i : i + 1], packed, pool=adapters.pool, rows=adapters.rows([terms[i]]), spans=adapters.spans)
        assert torch.equal(alone[0], batch[i])


def test_sgmv_adds_the_delta_between_untouched_columns(kernels, dtype, make_adapters):
    adapters = make_adapters(RANKS, 64, (40, 24), dtype, gap=9)
    x, y = torch.randn(11, 64).to(dtype), torch.randn(11, adapters.outputs + 3).to(dtype)
    terms, before = adapters.rows(_mixed_terms(11, len(RANKS))), y.clone()
    kernels.sgmv(y, x, adapters.pool, terms, adapters.spans)
    delta = reference.lora_delta(x.double(), adapters.pool, terms, adapters.spans.table, y.shape[1])
    _close(y, before.double() + delta, dtype)
    assert torch.equal(y[:, 40:49], before[:, 40:49])


@pytest.mark.parametrize("page_rank", [1, 4, 16])
def test_lora_linear_page_rank_does_not_matter(best, make_adapters, page_rank):
    adapters = make_adapters(RANKS, 64, (40,), torch.float32, page_rank=page_rank)
    x, weight = torch.randn(10, 64), torch.randn(40, 64)
    terms = adapters.rows(_mixed_terms(10, len(RANKS)))
    actual = best.linear(x, best.pack_linear(weight), pool=adapters.pool, rows=terms, spans=adapters.spans)
    delta = reference.lora_delta(x.double(), adapters.pool, terms, adapters.spans.table, 40)
    _close(actual, x.double() @ weight.double().T + delta, torch.float32)


@pytest.mark.parametrize(
    ("field", "index", "value"), [("slot_pages", (0, 0), 99), ("slot_pages", (0, 0), -1), ("ranks", (0, 0), 999)]
)
def test_lora_linear_corrupt_tables_are_refused(best, make_adapters, field, index, value):
    adapters = make_adapters([8], 64, (40,), torch.float32)
    getattr(adapters.pool, field)[index] = value
    with pytest.raises(RuntimeError, match="slot 0"):
        best.sgmv(torch.zeros(1, 40), torch.randn(1, 64), adapters.pool, adapters.rows([((0, 1.0),)]), adapters.spans)


def test_lora_linear_unknown_slot_is_refused(best, make_adapters):
    adapters = make_adapters([8], 64, (40,), torch.float32)
    with pytest.raises(RuntimeError, match="names slot 7 of 1"):
        best.sgmv(torch.zeros(1, 40), torch.randn(1, 64), adapters.pool, adapters.rows([((7, 1.0),)]), adapters.spans)
