from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch

from node.errors import ModelLoadError
from node.models.gguf_file import GgufFile

TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@pytest.fixture
def numbers():
    return np.random.default_rng(0).standard_normal((70, 64), dtype=np.float32)


@pytest.fixture
def write(tmp_path):
    """Write a GGUF file with the gguf package's writer; return its path."""

    def write(tensors, metadata=None, name="model.gguf"):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        for key, value in (metadata or {}).items():
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value), None)
        for tensor_name, array, kind in tensors:
            kind = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(tensor_name, gguf.quantize(array, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return write


@pytest.mark.parametrize("kind", TYPES)
def test_read_each_type_equals_the_gguf_package(kind, write, numbers):
    path = write([("first", numbers[:3], "F32"), ("t", numbers, kind)])
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "t")

    file = GgufFile(path)

    assert file.tensors["t"].shape == (70, 64)
    expected = torch.from_numpy(np.array(gguf.dequantize(stored.data, stored.tensor_type)))
    torch.testing.assert_close(file.read("t", torch.float32), expected, atol=0, rtol=0)
    torch.testing.assert_close(file.read("t", torch.bfloat16), expected.bfloat16(), atol=0, rtol=0)


def test_read_large_tensor_in_chunks_equals_whole(write):
    array = np.random.default_rng(1).standard_normal((5000, 128), dtype=np.float32)  # more than one chunk, the last one short

    file = GgufFile(write([("t", array, "F32"), ("v", array[0], "F32")]))

    torch.testing.assert_close(file.read("t", torch.float32), torch.from_numpy(array), atol=0, rtol=0)
    torch.testing.assert_close(file.read("v", torch.float32), torch.from_numpy(array[0]), atol=0, rtol=0)


def test_metadata_values_of_every_kind_are_read(write, numbers):
    metadata = {"a.text": "grün", "a.int": -3, "a.float": 0.5, "a.flag": True, "a.texts": ["x", "yz"], "a.ints": [1, 2, 3]}

    file = GgufFile(write([("t", numbers, "F32")], metadata))

    assert {key: file.metadata[key] for key in metadata} == metadata


def test_open_truncated_data_names_expected_bytes(write, numbers):
    path = write([("t", numbers, "Q8_0")])
    whole = GgufFile(path).tensors["t"]
    expected = whole.offset + whole.size_bytes
    path.write_bytes(path.read_bytes()[: expected - 100])

    with pytest.raises(ModelLoadError) as caught:
        GgufFile(path)

    assert caught.value.error_code == "model_corrupt"
    assert f"{path} has {expected - 100} bytes and its directory calls for {expected}" in caught.value.message


def test_read_file_cut_after_opening_is_refused(write, numbers):
    file = GgufFile(write([("t", numbers, "F32")]))
    file.path.write_bytes(file.path.read_bytes()[:-200])

    with pytest.raises(ModelLoadError, match="ended inside tensor t"):
        file.read("t", torch.float32)


@pytest.mark.parametrize("length", [0, 3, 23, 40, 100])
def test_open_truncated_header_is_refused(length, write, numbers):
    path = write([("t", numbers, "F32")], {"a.text": "x" * 100})
    path.write_bytes(path.read_bytes()[:length])

    with pytest.raises(ModelLoadError) as caught:
        GgufFile(path)

    assert caught.value.error_code == "model_corrupt"


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (b"GGML" + bytes(40), "model_corrupt"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(40), "model_unsupported"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(40), "model_unsupported"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40) + bytes(40), "model_corrupt"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + bytes(40), "model_corrupt"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 8, 1 << 60) + bytes(40), "model_corrupt"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 60) + bytes(40), "model_corrupt"),
        (b"GGUF" + struct.pack("<IQQQcI", 3, 0, 1, 1, b"k", 77) + bytes(40), "model_corrupt"),
        (b"GGUF" + struct.pack("<IQQQcI", 3, 1, 0, 1, b"t", 9) + bytes(40), "model_corrupt"),
        (b"GGUF" + struct.pack("<IQQQcIQIQ", 3, 1, 0, 1, b"t", 1, 0, 0, 0) + bytes(40), "model_corrupt"),
        (b"GGUF" + struct.pack("<IQQQcIQIQ", 3, 1, 0, 1, b"t", 1, 32, 999, 0) + bytes(40), "model_unsupported"),
        (b"GGUF" + struct.pack("<IQQQcIQIQ", 3, 1, 0, 1, b"t", 1, 31, 8, 0) + bytes(40), "model_corrupt"),
        (b"GGUF" + struct.pack("<IQQQcIQIQ", 3, 1, 0, 1, b"t", 1, 1 << 62, 0, 0) + bytes(40), "model_corrupt"),
        (b"GGUF" + struct.pack("<IQQQcIQIQ", 3, 1, 0, 1, b"\xff", 1, 32, 0, 0) + bytes(400), "model_corrupt"),
    ],
)
def test_open_hostile_header_is_refused(header, code, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(header)

    with pytest.raises(ModelLoadError) as caught:
        GgufFile(path)

    assert caught.value.error_code == code
    assert str(path) in caught.value.message


def test_open_missing_file_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="cannot be read"):
        GgufFile(tmp_path / "none.gguf")
