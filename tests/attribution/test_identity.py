import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.errors import IdentityError
from attribution.identity import TensorEntry, adapter_id, arithmetic_config, base_id, normal_name

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def entry(name, array):
    return TensorEntry(name, "F32", array.shape, array.tobytes)


def adapter(seed=0, prefix="base_model.model.", infix="."):
    generator = np.random.default_rng(seed)
    names = [f"{prefix}layers.{layer}.q_proj.lora_{side}{infix}weight" for layer in range(3) for side in "AB"]
    return [entry(name, generator.standard_normal((4, 6)).astype("<f4")) for name in names]


def test_adapter_id_golden_vectors_match(vectors):
    for case in vectors("identity.json")["adapters"]:
        tensors = [
            TensorEntry(t["name"], t["dtype"], tuple(t["shape"]), lambda t=t: bytes.fromhex(t["data_hex"]))
            for t in case["tensors"]
        ]
        assert adapter_id(tensors, case["config"]) == case["adapter_id"]


@given(st.randoms(), st.sampled_from([1, 4]))
def test_adapter_id_order_of_tensors_and_threads_change_nothing(generator: random.Random, threads):
    shuffled = adapter()
    generator.shuffle(shuffled)

    assert adapter_id(shuffled, CONFIG, threads=threads) == adapter_id(adapter(), CONFIG)


@pytest.mark.parametrize(("prefix", "infix"), [("", "."), ("base_model.model.", ".default."), ("", ".my_adapter.")])
def test_adapter_id_peft_wrapping_changes_nothing(prefix, infix):
    assert adapter_id(adapter(prefix=prefix, infix=infix), CONFIG) == adapter_id(adapter(), CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": ["k_proj"]},
        {"base_model_name_or_path": "elsewhere"},
        {"inference_mode": True},
        {"lora_dropout": 0.5},
        {"lora_alpha": 8.0},
        {"use_rslora": False},
        {"rank_pattern": {}},
        {"fan_in_fan_out": None},
    ],
)
def test_adapter_id_settings_that_do_not_change_the_arithmetic_change_nothing(change):
    assert adapter_id(adapter(), {**CONFIG, **change}) == adapter_id(adapter(), CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        {"r": 5},
        {"lora_alpha": 9},
        {"lora_alpha": 8.5},
        {"use_rslora": True},
        {"use_dora": True},
        {"fan_in_fan_out": True},
        {"alpha_pattern": {"q_proj": 2}},
        {"rank_pattern": {"q_proj": 2}},
        {"layers_to_transform": [0]},
    ],
)
def test_adapter_id_settings_that_change_the_arithmetic_change_it(change):
    assert adapter_id(adapter(), {**CONFIG, **change}) != adapter_id(adapter(), CONFIG)


def test_adapter_id_of_patterns_depends_on_their_order():
    first, second = {"a": 1, "b": 2}, {"b": 2, "a": 1}

    assert adapter_id(adapter(), {**CONFIG, "rank_pattern": first}) != adapter_id(adapter(), {**CONFIG, "rank_pattern": second})


@given(st.integers(0, 5), st.integers(0, 95), st.integers(0, 7))
def test_adapter_id_one_flipped_bit_changes_it(tensor_index, byte_index, bit):
    tensors = adapter()
    data = bytearray(tensors[tensor_index].read())
    data[byte_index] ^= 1 << bit
    old = tensors[tensor_index]
    tensors[tensor_index] = TensorEntry(old.name, old.dtype, old.shape, lambda: bytes(data))

    assert adapter_id(tensors, CONFIG) != adapter_id(adapter(), CONFIG)


def test_adapter_id_dtype_shape_and_name_change_it():
    expected = adapter_id(adapter(), CONFIG)
    first, *rest = adapter()

    assert adapter_id([TensorEntry(first.name, "I32", first.shape, first.read), *rest], CONFIG) != expected
    assert adapter_id([TensorEntry(first.name, "F32", (6, 4), first.read), *rest], CONFIG) != expected
    assert adapter_id([TensorEntry(first.name + "x", "F32", (4, 6), first.read), *rest], CONFIG) != expected
    assert adapter_id(rest, CONFIG) != expected


def test_adapter_id_two_tensors_with_one_normal_name_are_refused():
    doubled = [*adapter(prefix=""), *adapter()]

    with pytest.raises(IdentityError, match="two tensors"):
        adapter_id(doubled, CONFIG)


def test_adapter_id_without_tensors_is_refused():
    with pytest.raises(IdentityError, match="without tensors"):
        adapter_id([], CONFIG)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"q": float("nan")}, object()])
def test_arithmetic_config_without_an_exact_spelling_is_refused(value):
    with pytest.raises(IdentityError, match="alpha"):
        arithmetic_config({"lora_alpha": value})


def test_arithmetic_config_survives_json():
    config = {**CONFIG, "lora_alpha": 0.1, "rank_pattern": {"b": 2, "a": 1}}

    assert arithmetic_config(json.loads(json.dumps(config))) == arithmetic_config(config)
    assert arithmetic_config(config)["lora_alpha"] == "0.1"


def test_normal_name_without_a_marker_keeps_everything_but_the_wrapper():
    assert normal_name("base_model.model.model.embed_tokens.weight") == "model.embed_tokens.weight"
    assert normal_name("base_model.model.lm_head.lora_embedding_A.default") == "lm_head.lora_embedding_A.default"


def test_base_id_depends_on_names_and_bytes_but_not_on_places(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / "model.safetensors").write_bytes(b"weights")
    files = {folder: {p.name: p for p in (tmp_path / folder).iterdir()} for folder in ("a", "b")}

    first = base_id(files["a"])
    assert first == base_id(files["b"])
    (tmp_path / "b" / "config.json").write_text("{ }")
    assert first != base_id(files["b"])


def test_base_id_without_files_is_refused():
    with pytest.raises(IdentityError):
        base_id({})
