"""Adapters nobody should have to serve: each gets its own error, and the next good adapter is served as if nothing happened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from node.errors import AdapterIdError, AdapterInvalidError, AdapterNotFoundError

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Tools:
    """What a case may use to spoil the adapter in `directory`."""

    directory: Path
    writer: Any
    encode: Callable[..., bytes]
    encode_header: Callable[..., bytes]

    @property
    def weights(self) -> Path:
        return self.directory / "adapter_model.safetensors"

    @property
    def config(self) -> Path:
        return self.directory / "adapter_config.json"

    def set_header(self, **changes: Any) -> None:
        """Change the entry of Q0's lora_A."""
        self.weights.write_bytes(self.encode(self.writer.tensors(), {f"{Q0}.lora_A.weight": changes}))

    def set_tensors(self, **changes: Any) -> None:
        """Replace tensors by the end of their name; None removes."""
        tensors = self.writer.tensors()
        for end, value in changes.items():
            name = next(key for key in tensors if key.endswith(end.replace("__", ".")))
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value
        self.weights.write_bytes(self.encode(tensors))

    def set_config(self, **changes: Any) -> None:
        self.config.write_text(json.dumps(self.writer.config(**changes)))


def _many(count: int) -> bytes:
    entries = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(count)}
    return json.dumps(entries).encode()


def _only_bin(t: Tools) -> None:
    t.weights.rename(t.directory / "adapter_model.bin")


def _overlap(t: Tools) -> None:
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    }
    t.weights.write_bytes(t.encode_header(json.dumps(header).encode(), bytes(12)))


def _hole(t: Tools) -> None:
    header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}
    t.weights.write_bytes(t.encode_header(json.dumps(header).encode(), bytes(8)))


def _empty_tensor(t: Tools) -> None:
    header = {
        "a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    t.weights.write_bytes(t.encode_header(json.dumps(header).encode(), bytes(4)))


def _trailing(t: Tools) -> None:
    t.weights.write_bytes(t.weights.read_bytes() + b"smuggled")


def _linked_config(t: Tools) -> None:
    target = t.directory.parent.parent / "elsewhere.json"
    t.config.rename(target)
    t.config.symlink_to(target)


def _fifo_weights(t: Tools) -> None:
    t.weights.unlink()
    os.mkfifo(t.weights)


def _huge_config(t: Tools) -> None:
    with t.config.open("wb") as file:
        file.truncate(200 << 20)


def _nonfinite(dtype: str, bits: bytes) -> Callable[[Tools], None]:
    def spoil(t: Tools) -> None:
        tensors = t.writer.tensors(dtype=dtype)
        name = f"{Q0}.lora_A.weight"
        kind, shape, raw = tensors[name]
        tensors[name] = (kind, shape, raw[: -len(bits)] + bits)
        t.weights.write_bytes(t.encode(tensors))

    return spoil


def _raw_header(header: bytes) -> Callable[[Tools], None]:
    return lambda t: (t.weights.write_bytes(t.encode_header(header, bytes(4))), None)[1]


def _raw_file(content: bytes) -> Callable[[Tools], None]:
    return lambda t: (t.weights.write_bytes(content), None)[1]


def _raw_config(content: bytes) -> Callable[[Tools], None]:
    return lambda t: (t.config.write_bytes(content), None)[1]


def _config(**changes: Any) -> Callable[[Tools], None]:
    return lambda t: t.set_config(**changes)


def _header(**changes: Any) -> Callable[[Tools], None]:
    return lambda t: t.set_header(**changes)


def _tensors(**changes: Any) -> Callable[[Tools], None]:
    return lambda t: t.set_tensors(**changes)


def _all_tensors(**options: Any) -> Callable[[Tools], None]:
    return lambda t: (t.weights.write_bytes(t.encode(t.writer.tensors(**options))), None)[1]


def _renamed(old: str, new: str) -> Callable[[Tools], None]:
    def spoil(t: Tools) -> None:
        t.weights.write_bytes(t.encode({name.replace(old, new): value for name, value in t.writer.tensors().items()}))

    return spoil


ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
PICKLE = b"\x80\x04\x95\x1b\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x01a\x94K\x01u."
INF32, NAN16, INF_BF16 = b"\x00\x00\x80\x7f", b"\x00\x7e", b"\x80\xff"
NEAR_INF32 = b"\x00\x80\x7f\xff"  # finite, but bfloat16 rounds it to infinity

# What PEFT writes when LoraConfig has no task_type.
PEFT_AUTO_MAPPING = {
    "base_model_class": "LlamaForCausalLM",
    "parent_library": "transformers.models.llama.modeling_llama",
}

CASES: list[tuple[str, Callable[[Tools], None], str, str]] = [
    ("01-bin-only", _only_bin, "adapter_format_unsupported", "only safetensors and GGUF adapters are accepted"),
    ("02-pickle", _raw_file(PICKLE), "adapter_corrupt", "exceeds the file's"),
    ("03-empty", _raw_file(b""), "adapter_corrupt", "0 < 8 bytes"),
    ("04-length-2-63", _raw_file((1 << 63).to_bytes(8, "little")), "adapter_corrupt", "0x8000000000000000"),
    ("05-long-header", _raw_header(b'{"a":' + ONE.encode() + b"}" + b" " * (17 << 20)), "adapter_header_too_large", "16777216"),
    ("05-bracket-bomb", _raw_header(b'{"a":[' + b"[]," * 600_000 + b"[]]}"), "adapter_header_too_large", "1000000"),
    ("06-many-tensors", _raw_header(_many(100_000)), "adapter_too_many_tensors", "20000"),
    ("07-not-utf8", _raw_header(b'{"\xff":1}'), "adapter_corrupt", "UTF-8"),
    ("07-not-json", _raw_header(b'{"a":'), "adapter_corrupt", "not valid JSON"),
    ("07-not-object", _raw_header(b"[1]"), "adapter_corrupt", "not a JSON object"),
    ("07-duplicate", _raw_header(f'{{"a":{ONE},"a":{ONE}}}'.encode()), "adapter_corrupt", "'a' twice"),
    ("07-nan", _raw_header(b'{"a":NaN}'), "adapter_corrupt", "NaN"),
    ("07-deep", _raw_header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "adapter_corrupt", "nested too deep"),
    ("07-long-integer", _raw_header(b'{"a":' + b"9" * 10_000 + b"}"), "adapter_corrupt", "not valid JSON"),
    ("07-metadata", _raw_header(b'{"__metadata__":{"x":1},"a":' + ONE.encode() + b"}"), "adapter_corrupt", "__metadata__"),
    ("07-no-tensors", _raw_header(b"{}"), "adapter_corrupt", "no tensors"),
    ("08-beyond-end", _header(data_offsets=[0, 10**9]), "adapter_corrupt", "1000000000"),
    ("08-backwards", _header(data_offsets=[64, 0]), "adapter_corrupt", "data_offsets"),
    ("09-overlap", _overlap, "adapter_corrupt", "overlaps"),
    ("09-hole", _hole, "adapter_corrupt", "hole"),
    ("09-empty-tensor", _empty_tensor, "adapter_corrupt", "positive sizes"),
    ("09-trailing", _trailing, "adapter_corrupt", "belong to none"),
    ("10-overflow", _header(shape=[2**62, 2**62]), "adapter_corrupt", "needs"),
    ("10-size-2-80", _header(shape=[2**80, 1]), "adapter_corrupt", "positive sizes"),
    ("10-negative", _header(shape=[-2, -8]), "adapter_corrupt", "positive sizes"),
    ("10-nine-dims", _header(shape=[1] * 7 + [2, 8]), "adapter_corrupt", "up to 8"),
    ("10-bool", _header(shape=[True, 16]), "adapter_corrupt", "positive sizes"),
    ("11-length", _header(shape=[3, 8]), "adapter_corrupt", f"{Q0}.lora_A.weight"),
    ("11-extra-field", _header(pickle="x"), "adapter_corrupt", "exactly dtype, shape and data_offsets"),
    ("12-unknown-dtype", _header(dtype="Q4"), "adapter_dtype", "'Q4'"),
    ("12-integers", _tensors(self_attn__q_proj__lora_A__weight=("I64", [2, 8], bytes(128))), "adapter_dtype", "'I64'"),
    ("12-fp8", _tensors(self_attn__q_proj__lora_A__weight=("F8_E4M3", [2, 8], bytes(16))), "adapter_dtype", "F8_E4M3"),
    ("13-r-0", _config(r=0), "adapter_rank_unsupported", "below 1"),
    ("13-r-minus-1", _config(r=-1), "adapter_rank_unsupported", "below 1"),
    ("13-r-huge", _config(r=10**9), "adapter_rank_unsupported", "> max 64"),
    ("13-r-above-max", _config(r=512), "adapter_rank_unsupported", "rank 512 > max 64"),
    ("13-r-enormous", _raw_config(b'{"peft_type":"LORA","r":1' + b"0" * 4000 + b"}"), "adapter_rank_unsupported", "bits"),
    ("13-r-float", _config(r=2.0), "adapter_config_invalid", "whole number"),
    ("13-r-true", _config(r=True), "adapter_config_invalid", "whole number"),
    ("13-pattern-rank", _config(rank_pattern={"q_proj": 65}), "adapter_rank_unsupported", "rank_pattern"),
    ("13-stated-rank", _config(r=4), "adapter_config_invalid", "has rank 2"),
    (
        "14-ranks",
        _tensors(self_attn__q_proj__lora_B__weight=("F32", [8, 3], bytes(96))),
        "adapter_base_mismatch",
        "layers.0.self_attn.q",
    ),
    ("14-outputs", _tensors(self_attn__q_proj__lora_B__weight=("F32", [6, 2], bytes(48))), "adapter_base_mismatch", "8 to 6"),
    ("14-inputs", _tensors(self_attn__q_proj__lora_A__weight=("F32", [2, 4], bytes(32))), "adapter_base_mismatch", "4 to 8"),
    ("14-vector", _tensors(self_attn__q_proj__lora_A__weight=("F32", [16], bytes(64))), "adapter_base_mismatch", "disagree"),
    ("14-no-module", _renamed("model.layers", "transformer.h"), "adapter_base_mismatch", "none of the adapter's 6 modules"),
    ("14-some-modules", _all_tensors(layers=3), "adapter_base_mismatch", "3 of the adapter's 9 modules"),
    ("14-fewer-layers", _all_tensors(layers=1), "adapter_base_mismatch", "no weights for 3 modules"),
    ("14-half-a-pair", _tensors(self_attn__q_proj__lora_B__weight=None), "adapter_corrupt", "has no lora_B"),
    ("15-infinity-f32", _nonfinite("F32", INF32), "adapter_nonfinite", "q_proj.lora_A"),
    ("15-infinity-once-rounded", _nonfinite("F32", NEAR_INF32), "adapter_nonfinite", "q_proj.lora_A"),
    ("15-nan-f16", _nonfinite("F16", NAN16), "adapter_nonfinite", "q_proj.lora_A"),
    ("15-infinity-bf16", _nonfinite("BF16", INF_BF16), "adapter_nonfinite", "q_proj.lora_A"),
    *[
        (f"16-alpha-{value!r}", _config(lora_alpha=value), "adapter_config_invalid", "lora_alpha")
        for value in (0, -1, "16", 1e308, True, [8])
    ],
    ("16-alpha-nan", _raw_config(b'{"peft_type":"LORA","r":2,"lora_alpha":NaN}'), "adapter_config_invalid", "NaN"),
    ("16-alpha-1e999", _raw_config(b'{"peft_type":"LORA","r":2,"lora_alpha":1e999}'), "adapter_config_invalid", "lora_alpha"),
    ("17-catastrophic", _config(target_modules="(a+)+$"), "adapter_config_invalid", "does not select"),
    ("17-long", _config(target_modules="q" * 50_000), "adapter_config_invalid", "4096"),
    ("17-rank-pattern", _config(rank_pattern={"(?=a)": 4}), "adapter_feature_unsupported", "rank_pattern"),
    ("17-unselected", _config(target_modules=["q_proj", "v_proj"]), "adapter_config_invalid", "down_proj"),
    ("18-auto-mapping", _config(auto_mapping={"base_model_class": "Evil"}), "adapter_code_refused", "auto_mapping"),
    (
        "18-as-peft-writes-it",
        _config(auto_mapping=PEFT_AUTO_MAPPING, task_type=None),
        "adapter_code_refused",
        "delete it, and set",
    ),
    ("18-remote-code", _config(trust_remote_code=True), "adapter_code_refused", "trust_remote_code"),
    ("18-python", lambda t: (t.directory / "modeling.py").write_text("import os"), "adapter_code_refused", "modeling.py"),
    ("19-ia3", _config(peft_type="IA3"), "adapter_feature_unsupported", "IA3"),
    ("19-no-type", _config(peft_type=None), "adapter_feature_unsupported", "peft_type"),
    ("19-dora-without-magnitudes", _config(use_dora=True), "adapter_config_invalid", "lacks a magnitude_vector"),
    ("19-lora-bias-without-biases", _config(lora_bias=True), "adapter_config_invalid", "lacks a bias"),
    ("19-prompt-tuning", _config(peft_type="PROMPT_TUNING"), "adapter_feature_unsupported", "prompt tuning"),
    ("19-bias", _config(bias="lora_only"), "adapter_feature_unsupported", "bias"),
    ("19-modules-to-save", _config(modules_to_save=["lm_head"]), "adapter_feature_unsupported", "modules_to_save"),
    ("19-tokens", _config(trainable_token_indices=[1]), "adapter_feature_unsupported", "trainable_token_indices"),
    ("19-pissa", _config(init_lora_weights="pissa"), "adapter_feature_unsupported", "pissa"),
    ("19-future", _config(use_new_idea={"strength": 1}), "adapter_feature_unsupported", "use_new_idea"),
    (
        "19-embedding",
        _renamed("0.self_attn.q_proj.lora_A.weight", "e.lora_embedding_A"),
        "adapter_base_mismatch",
        "not in this base model",
    ),
    ("20-missing", lambda t: t.config.unlink(), "adapter_config_invalid", "missing"),
    ("20-huge", _huge_config, "adapter_config_invalid", "209715200"),
    ("20-deep", _raw_config(b"[" * 10_000 + b"]" * 10_000), "adapter_config_invalid", "nested too deep"),
    ("20-bom", _raw_config(b'\xef\xbb\xbf{"r":2}'), "adapter_config_invalid", "byte order mark"),
    ("20-symlink", _linked_config, "adapter_config_invalid", "symbolic link"),
    ("20-not-object", _raw_config(b"3"), "adapter_config_invalid", "JSON object"),
    ("21-fifo", _fifo_weights, "adapter_corrupt", "not a regular file"),
    ("manifest", lambda t: (t.directory / "manifest.json").write_text("{}"), "adapter_manifest_invalid", "manifest.json"),
]


@pytest.mark.parametrize(("spoil", "code", "words"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
async def test_resolve_bad_adapter_is_refused_by_name_and_the_next_good_one_is_served(
    catalog, writer, encode, encode_header, spoil, code, words
):
    writer.write("good")
    before = (await catalog.resolve("good")).adapter_id
    spoil(Tools(writer.write("bad"), writer, encode, encode_header))

    with pytest.raises(AdapterInvalidError) as caught:
        await catalog.resolve("bad")

    assert caught.value.error_code == code
    assert words in caught.value.message
    assert "bad" in caught.value.message
    assert str(writer.root) not in caught.value.message
    assert (await catalog.resolve("good")).adapter_id == before
    assert [entry.name for entry in catalog.entries()] == ["good"]


@pytest.mark.parametrize(
    "name",
    [
        "", "a,b", "a\nb", "a\x00b", "%2e%2e", "a%2fb", "abc\u202egnp", "x" * 5000, "a/b/c", "a@", "@main", "..", "../x", "/etc",
        "./a", "a/..", "a/", "/", "a//b", "a b", "ä", "a@b@c", "a@../x", "a..b", "-a", ".hidden", "a\\b", "c:x",
        "x" * 97, "a.lock", "a@b//c", "a@/b", "a@b/../c",
    ],
)  # fmt: skip
async def test_resolve_malformed_name_is_refused_and_nothing_is_opened(catalog, writer, name):
    writer.write("good")

    with pytest.raises(AdapterIdError) as caught:
        await catalog.resolve(name)

    assert caught.value.error_code == "adapter_id_invalid"
    assert caught.value.message.isascii()
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500
    assert (await catalog.resolve("good")).name == "good"


@pytest.mark.parametrize("kind", ["outside", "fifo", "file", "missing", "root-itself"])
async def test_resolve_what_is_no_adapter_directory_is_not_found(catalog, writer, tmp_path, kind):
    target = writer.root / "odd"
    if kind == "outside":
        type(writer)(tmp_path / "secret").write("adapter")
        target.symlink_to(tmp_path / "secret" / "adapter")
    elif kind == "fifo":
        os.mkfifo(target)
    elif kind == "file":
        target.write_text("text")
    elif kind == "root-itself":
        target.symlink_to(writer.root)

    with pytest.raises(AdapterNotFoundError) as caught:
        await catalog.resolve("odd", "local")

    assert caught.value.error_code == "adapter_not_found"
    assert "secret" not in caught.value.message
