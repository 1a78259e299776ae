"""Tensors put in place by threads are those of the plain way, whatever the file's dtype and however they are cut into pieces."""

import threading
from concurrent.futures import ThreadPoolExecutor

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


@pytest.mark.parametrize(("dtype", "needs_room"), [(torch.bfloat16, False), (torch.float32, True)])
def test_only_what_is_converted_needs_room_on_its_way(files, dtype, needs_room):
    device = DevicePlacement(SafetensorsWeights(files), torch.device("cpu"))
    device.joined([("b", (5, 33))], dtype)
    device.finish()
    assert device.needs_room is needs_room


def test_what_nobody_waits_for_is_given_up(files, monkeypatch):
    may_read, read = threading.Event(), []
    real = placement._read_exactly

    def slow(*given):
        assert may_read.wait(10)
        read.append(given)
        real(*given)

    class Pool(ThreadPoolExecutor):
        def shutdown(self, **how):
            super().shutdown(wait=False, cancel_futures=how["cancel_futures"])
            may_read.set()
            super().shutdown()

    monkeypatch.setattr(placement, "_read_exactly", slow)
    monkeypatch.setattr(placement, "ThreadPoolExecutor", Pool)
    device = DevicePlacement(SafetensorsWeights(files), torch.device("cpu"), threads=1)
    for _ in range(3):
        device.joined([("b", (5, 33))], torch.bfloat16)
    device.close()
    assert len(read) <= 1
