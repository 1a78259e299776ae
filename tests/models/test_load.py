from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from node.errors import ModelLoadError
from node.kernels.ops import Kernels
from node.models import load as subject
from node.models.load import loading, make_kv_cache, open_source
from node.models.placement import HostPlacement
from node.models.source import resolve


@pytest.fixture
def copy(tiny_llama, tmp_path):
    """A checkpoint to spoil: the directory and a function that rewrites its config.json."""
    directory = shutil.copytree(tiny_llama.directory, tmp_path / "copy")

    def change(**fields):
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return directory, change


def spoil(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_load_sharded_checkpoint_equals_whole(make_tiny, load, drive, prompts, error):
    tiny = make_tiny("llama", max_shard_size="60KB")
    assert len(list(tiny.directory.glob("*.safetensors"))) > 2
    driver = drive(load(tiny.directory))
    driver.add("a", prompts["a"])

    assert error(driver.run([{"a": 29}])["a"], tiny.logits(prompts["a"])) < 1e-4


def test_load_says_what_it_loaded(tiny_llama, load, tmp_path):
    loaded = load(tiny_llama.directory, page_rank=4, max_model_len=64, hash_cache=tmp_path / "hashes.json")

    assert loaded.spec.max_model_len == 64
    assert loaded.layout.page_rank == 4
    assert loaded.layout.module_count == 3 * 7 + 1
    assert len(loaded.base_id) == 64
    assert loaded.base_id in (tmp_path / "hashes.json").read_text()


@pytest.mark.parametrize(
    ("change", "named", "code"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight", "model_corrupt"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight", "model_corrupt"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight", "model_corrupt"),
        (lambda t: t.update({"model.norm.weight": torch.ones(5)}), "[5]", "model_corrupt"),
        (lambda t: t.update({"model.layers.0.mlp.router.weight": torch.ones(5)}), "mlp.router.weight", "model_unsupported"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), "q_proj.bias", "model_unsupported"),
    ],
)
def test_load_weights_that_do_not_fit_are_refused_by_name(change, named, code, copy, load):
    spoil(copy[0], change)

    with pytest.raises(ModelLoadError) as caught:
        load(copy[0])

    assert named in caught.value.message
    assert caught.value.error_code == code


def test_load_stored_inverse_frequencies_are_ignored(copy, load):
    spoil(copy[0], lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))

    assert load(copy[0]).spec.layer_count == 3


def test_load_unsupported_architecture_is_refused_before_reading_weights(copy, load):
    copy[1](model_type="mixtral")
    (copy[0] / "model.safetensors").write_bytes(b"never looked at")

    with pytest.raises(ModelLoadError, match="mixtral"):
        load(copy[0])


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_load_damaged_config_is_refused(content, copy, load):
    (copy[0] / "config.json").write_text(content)

    with pytest.raises(ModelLoadError, match=r"config\.json") as caught:
        load(copy[0])

    assert caught.value.error_code == "model_corrupt"


def test_load_generation_config_adds_eos_ids(copy, load):
    (copy[0] / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))

    assert load(copy[0]).spec.eos_token_ids == (2, 5)


def test_make_kv_cache_uses_at_most_the_bytes_given(tiny_llama, load):
    spec = load(tiny_llama.directory).spec

    kv = make_kv_cache(spec, 100_000, 16, torch.bfloat16)

    used = sum(tensor.numel() * tensor.itemsize for tensor in (*kv.keys, *kv.values))
    one_block = used // kv.block_count
    assert used <= 100_000 < used + one_block
    assert kv.keys[0].shape == (kv.block_count, spec.kv_head_count, 16, spec.head_dim)
    assert len(kv.keys) == len(kv.values) == spec.layer_count


def test_make_kv_cache_smaller_than_a_block_is_refused(tiny_llama, load):
    with pytest.raises(ModelLoadError, match=r"engine\.kv_cache_bytes") as caught:
        make_kv_cache(load(tiny_llama.directory).spec, 100, 16, torch.float32)

    assert caught.value.error_code == "model_too_large"


@pytest.fixture
def begun(tiny_llama, monkeypatch):
    """A model being loaded, and what becomes of its placement."""
    log = []

    class Logged(HostPlacement):
        def finish(self):
            log.append("finish")

        def close(self):
            log.append("close")

    monkeypatch.setattr(subject, "HostPlacement", Logged)
    source = open_source(resolve(str(tiny_llama.directory)), None, begun_hash=lambda: "ab" * 32)
    return loading(source, torch.float32, Kernels.load("reference"), 8), log


def test_loading_waits_for_weights_when_the_block_has_ended(begun):
    with begun[0] as loaded:
        assert not begun[1]
    assert begun[1] == ["finish", "close"]
    assert loaded.base_id == "ab" * 32


def test_loading_gives_weights_up_when_the_block_fails(begun):
    with pytest.raises(LookupError), begun[0]:
        raise LookupError("no memory")
    assert begun[1] == ["close"]
