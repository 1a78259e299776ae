from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from node.errors import ModelLoadError
from node.models.safetensors_weights import SafetensorsWeights
from node.models.weights import read_checked


@pytest.fixture
def shards(tmp_path):
    save_file({"a": torch.randn(3, 4), "b": torch.randn(5).half()}, tmp_path / "1.safetensors")
    save_file({"c": torch.randn(2, 2).bfloat16()}, tmp_path / "2.safetensors")
    return tmp_path / "1.safetensors", tmp_path / "2.safetensors"


def test_read_shards_as_one_checkpoint(shards):
    weights = SafetensorsWeights(shards)

    assert weights.names() == {"a", "b", "c"}
    assert weights.shape("a") == (3, 4)
    assert weights.read("c", torch.float32).dtype == torch.float32
    assert weights.read("b", torch.bfloat16).shape == (5,)


def test_read_after_the_file_is_gone_keeps_its_own_memory(shards):
    weights = SafetensorsWeights(shards)
    kept = weights.read("a", torch.float32)
    before = kept.clone()
    shards[0].write_bytes(bytes(shards[0].stat().st_size))

    torch.testing.assert_close(kept, before)


def test_open_truncated_names_file_and_expected_bytes(shards):
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[:-7])

    with pytest.raises(ModelLoadError) as caught:
        SafetensorsWeights(shards)

    assert caught.value.error_code == "model_corrupt"
    assert f"{shards[0]} has {len(content) - 7} bytes and its header calls for {len(content)}" in caught.value.message


def framed(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x01",
        struct.pack("<Q", 1 << 60) + b"{}",
        framed(b"not json"),
        framed(b"[1]"),
        framed({"a": {"dtype": "F32"}}),
        framed({"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 0]}}),
        framed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}),
        framed({"a": 7}),
        framed(b'{"a":' * 3000),
    ],
)
def test_open_damaged_header_is_refused(content, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)

    with pytest.raises(ModelLoadError) as caught:
        SafetensorsWeights((path,))

    assert caught.value.error_code == "model_corrupt"
    assert str(path) in caught.value.message


def test_open_integer_tensor_is_refused_by_name(tmp_path):
    save_file({"packed": torch.zeros(2, dtype=torch.int8)}, tmp_path / "q.safetensors")

    with pytest.raises(ModelLoadError, match=r"packed in .* is I8"):
        SafetensorsWeights((tmp_path / "q.safetensors",))


def test_open_tensor_in_two_shards_is_refused(shards, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "3.safetensors")

    with pytest.raises(ModelLoadError, match="tensor a is in both"):
        SafetensorsWeights((*shards, tmp_path / "3.safetensors"))


def test_read_checked_missing_or_misshapen_is_refused(shards):
    weights = SafetensorsWeights(shards)

    with pytest.raises(ModelLoadError, match="no tensor z"):
        read_checked(weights, "z", (1,), torch.float32)
    with pytest.raises(ModelLoadError, match=r"a has shape \[3, 4\] and the configuration calls for \[4, 3\]"):
        read_checked(weights, "a", (4, 3), torch.float32)
