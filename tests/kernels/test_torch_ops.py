"""The operations as torch sees them: schemas, aliasing, fake tensors; and how an implementation is chosen."""

import pytest
import torch

from node.errors import ConfigError
from node.kernels import compiled
from node.kernels.ops import Kernels

CHECKS = ("test_schema", "test_faketensor")


def _check(name, *arguments):
    torch.library.opcheck(getattr(torch.ops.openlora, name).default, arguments, test_utils=CHECKS)


def test_opcheck_rows(best, dtype):
    x, weight = torch.randn(4, 32).to(dtype), torch.randn(32).to(dtype)
    _check("rms_norm", x, weight, 1e-5, 0, 1)
    _check("add_rms_norm", x, x.clone(), weight, 1e-5, 0, 1)
    _check("silu_mul", x, 0, 1)


def test_opcheck_linear(best, dtype, make_adapters):
    adapters = make_adapters([4, 9], 33, (20, 13), dtype)
    x, weight = torch.randn(3, 33).to(dtype), torch.randn(33, 33).to(dtype)
    packed, rows, pool = best.pack_linear(weight).data, adapters.rows([((0, 1.0),), ((1, 2.0),), ()]), adapters.pool
    lora = (
        pool.pages,
        pool.slot_pages,
        pool.ranks,
        pool.scales,
        8,
        rows.row_start,
        rows.slot,
        rows.weight,
        adapters.spans.table,
        0,
        1,
    )
    _check("pack_linear", weight)
    _check("linear", x, packed, None, 33, False, 0, 1)
    _check("linear", x, packed, weight[0].clone(), 33, True, 0, 1)
    _check("lora_linear", x, packed, None, 33, False, *lora)
    _check("sgmv", torch.randn(3, 33).to(dtype), x, *lora)


def test_opcheck_attention(best, dtype):
    cache = torch.randn(2, 1, 16, 8).to(dtype)
    table = torch.randn(40, 4)
    ints = (
        torch.tensor([[0, 1]], dtype=torch.int32),
        torch.tensor([0, 2], dtype=torch.int32),
        torch.tensor([20], dtype=torch.int32),
    )
    _check("paged_attention", torch.randn(2, 16).to(dtype), cache, cache.clone(), *ints, 0.3, 0, 0, 1)
    places = (torch.tensor([3, 4]), torch.tensor([7, 20]))
    _check("rope_kv_write", torch.randn(2, 32).to(dtype), table, table, *places, cache, cache.clone(), None, None, 1e-6, 0, 1)


def test_load_auto_takes_the_best_compiled_path(best):
    assert Kernels.load().name == best.name
    assert best.name.startswith("cpp-")


def test_load_reference_never_compiles():
    assert Kernels.load("reference").name == "reference"


def test_load_cpp_without_library_names_the_remedy(monkeypatch):
    monkeypatch.setattr(compiled, "library_path", lambda: None)
    with pytest.raises(ConfigError, match=r"python -m node\.kernels\.build"):
        Kernels.load("cpp")
    assert Kernels.load("auto").name == "reference"


def test_load_unknown_instruction_set_is_refused():
    with pytest.raises(ConfigError, match="avx9"):
        Kernels.load("cpp", isa="avx9")


def test_reference_deterministic_rows_have_the_same_bits():
    kernels = Kernels.load("reference", is_deterministic=True)
    x, packed = torch.randn(9, 64), kernels.pack_linear(torch.randn(40, 64))
    batch = kernels.linear(x, packed)
    assert all(torch.equal(kernels.linear(x[i : i + 1], packed)[0], batch[i]) for i in range(9))
