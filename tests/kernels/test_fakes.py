"""Every operation of both libraries has a fake, and a test that shows it to opcheck."""

import re
from pathlib import Path

import pytest

from node.kernels.build import source_dir
from node.kernels.fakes import CUDA_OPS, FAKES

HERE = Path(__file__).parent


def operations(binding):
    """Names of the schemas that take a tensor."""
    text = re.sub(
        r'"\s*(OPENLORA_ADAPTERS\s*)?"', lambda found: "Tensor " if found[1] else "", (source_dir() / binding).read_text()
    )
    return set(re.findall(r'm\.def\(\s*"(\w+)\([^"]*?Tensor', text))


@pytest.mark.parametrize(("binding", "fakes"), [("binding_cpu.cc", FAKES), ("binding_cuda.cc", CUDA_OPS)])
def test_every_operation_on_tensors_has_a_fake(binding, fakes):
    assert operations(binding) == set(fakes)


@pytest.mark.parametrize("name", CUDA_OPS)
def test_every_operation_of_a_gpu_is_shown_to_opcheck(name):
    texts = [path.read_text() for path in (HERE / "cuda").glob("test_*.py")]
    assert any(re.search(rf"(?:opcheck|check)\(\s*torch\.ops\.openlora\.{name}\.default", text) for text in texts)


@pytest.mark.parametrize("name", FAKES)
def test_every_operation_of_a_cpu_is_shown_to_opcheck(name):
    assert f'_check("{name}"' in (HERE / "test_torch_ops.py").read_text()
