import numpy as np
import pytest
import torch

from node.adapters.page_filler import convert, to_bfloat16_bits


def test_bfloat16_rounding_equals_torch():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat([values, ties, torch.tensor([0.0, -0.0, 1e-40])])
    expected = x.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bfloat16_bits(x.numpy()), expected)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_convert_equals_torch(dtype, target):
    source = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).to(
        {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    )
    raw = source.view(torch.int16).numpy().view(np.uint16) if dtype == "BF16" else source.numpy()
    number = np.dtype(np.float32 if target == torch.float32 else np.uint16)
    found = convert(raw, dtype, number)
    expected = source.to(target)
    bits = expected.numpy() if target == torch.float32 else expected.view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(found, bits)
