"""Tensors put in place by threads are those of the plain way, whatever the file's dtype and however they are cut into pieces."""

import pytest
import torch
from safetensors.torch import save_file

from node.errors import ModelLoadError
from node.models import placement
from node.models.placement import DevicePlacement, HostPlacement
from node.models.safetensors_weights import SafetensorsWeights


@pytest.fixture
def files(tmp_path):
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "a": torch.randn(7, 33, generator=generator),
        "b": torch.randn(5, 33, generator=generator).bfloat16(),
        "c": torch.randn(11, generator=generator).half(),
    }
    save_file({"a": tensors["a"], "c": tensors["c"]}, str(tmp_path / "one.safetensors"))
    save_file({"b": tensors["b"]}, str(tmp_path / "two.safetensors"))
    return tmp_path / "one.safetensors", tmp_path / "two.safetensors"


@pytest.mark.parametrize("piece_bytes", [16, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_placement_equals_the_host_placement(files, monkeypatch, dtype, piece_bytes):
    monkeypatch.setattr(placement, "STAGE_BYTES", piece_bytes)
    host = HostPlacement(SafetensorsWeights(files))
    device = DevicePlacement(SafetensorsWeights(files), torch.device("cpu"), threads=3)
    for parts in ([("a", (7, 33)), ("b", (5, 33))], [("c", (11,))], [("b", (5, 33))]):
        whole = device.joined(parts, dtype)
        expected = host.joined(parts, dtype)
        assert whole.shape == expected.shape
        both = (whole, expected)
    device.finish()
    assert torch.equal(*both)


def test_weights_that_are_no_files_are_copied(files):
    class Plain:
        def __init__(self, weights):
            self.names, self.shape, self.read = weights.names, weights.shape, weights.read

    device = DevicePlacement(Plain(SafetensorsWeights(files)), torch.device("cpu"))
    whole = device.joined([("a", (7, 33))], torch.bfloat16)
    device.finish()
    assert torch.equal(whole, SafetensorsWeights(files).read("a", torch.bfloat16))


def test_tensor_of_another_shape_is_refused_at_once(files):
    with pytest.raises(ModelLoadError, match="shape"):
        DevicePlacement(SafetensorsWeights(files), torch.device("cpu")).joined([("a", (33, 7))], torch.float32)


def test_file_cut_short_while_it_is_read_is_an_error(files):
    weights = SafetensorsWeights(files)
    files[0].write_bytes(files[0].read_bytes()[:300])
    device = DevicePlacement(weights, torch.device("cpu"))
    device.joined([("a", (7, 33))], torch.float32)
    with pytest.raises(ModelLoadError, match="ended"):
        device.finish()
