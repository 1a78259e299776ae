"""RMSNorm, SiLU and the rotary write against float64."""

import pytest
import torch

from node.kernels import reference


def _tolerance(dtype):
    return 1e-2 if dtype == torch.bfloat16 else 2e-6


@pytest.mark.parametrize("shape", [(1, 576), (5, 33), (200, 576), (0, 16)])
def test_rms_norm_random_rows_match_float64(kernels, dtype, shape):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    expected = reference.rms_norm(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5).double(), expected, atol=1e-5, rtol=_tolerance(dtype))


def test_add_rms_norm_adds_once_and_norms_the_rounded_sum(kernels, dtype):
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((7, 100), (7, 100), (100,)))
    expected_sum = (x.float() + residual.float()).to(dtype)
    actual = kernels.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, expected_sum)
    assert torch.equal(actual, kernels.rms_norm(expected_sum, weight, 1e-5))


@pytest.mark.parametrize("shape", [(1, 3072), (3, 34), (90, 512)])
def test_silu_mul_random_rows_match_float64(kernels, dtype, shape):
    gate_up = (torch.randn(shape) * 20).to(dtype)
    expected = reference.silu_mul(gate_up.double())
    torch.testing.assert_close(kernels.silu_mul(gate_up).double(), expected, atol=1e-6, rtol=_tolerance(dtype))


@pytest.mark.parametrize(("heads", "groups", "size"), [(9, 3, 64), (2, 2, 6), (4, 1, 128)])
@pytest.mark.parametrize("has_norms", [False, True])
def test_rope_kv_write_matches_float64(kernels, dtype, heads, groups, size, has_norms):
    rows, block = 21, 16
    qkv = torch.randn(rows, (heads + 2 * groups) * size).to(dtype)
    angles = torch.randn(100, size // 2)
    cos, sin = angles.cos(), angles.sin()
    positions, slots = torch.randint(0, 100, (rows,)), torch.randperm(3 * block)[:rows]
    norms = [torch.randn(size).to(dtype) if has_norms else None for _ in range(2)]
    keys = torch.full((3, groups, block, size), float("nan")).to(dtype)
    values = keys.clone()
    wide = [keys.double(), values.double()]
    q = kernels.rope_kv_write(qkv, cos, sin, positions, slots, keys, values, q_norm=norms[0], k_norm=norms[1], eps=1e-6)
    wide_norms = [None if norm is None else norm.double() for norm in norms]
    expected = reference.rope_kv_write(qkv.double(), cos, sin, positions, slots, *wide, *wide_norms, 1e-6)
    tolerance = {"atol": 2e-2 if dtype == torch.bfloat16 else 2e-6, "rtol": _tolerance(dtype)}
    torch.testing.assert_close(q.double(), expected, **tolerance)
    torch.testing.assert_close(keys.double(), wide[0], equal_nan=True, **tolerance)
    assert torch.equal(values.nan_to_num(7.0), wide[1].to(dtype).nan_to_num(7.0))


@pytest.mark.parametrize(("position", "slot"), [(-1, 0), (100, 0), (0, 16), (0, -1)])
def test_rope_kv_write_outside_tables_is_refused(best, position, slot):
    keys = torch.zeros(1, 1, 16, 4)
    table = torch.zeros(100, 2)
    with pytest.raises(RuntimeError, match=r"position|slot"):
        best.rope_kv_write(torch.randn(1, 12), table, table, torch.tensor([position]), torch.tensor([slot]), keys, keys.clone())
