"""Every kind of PEFT LoRA through the engine against PEFT's own forward pass, float32."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from node.errors import AdapterInvalidError

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "rslora": {"r": 8, "lora_alpha": 4, "target_modules": ALL_LINEAR, "use_rslora": True},
    "rank_pattern": {"r": 4, "target_modules": ALL_LINEAR, "rank_pattern": {"q_proj": 20, "layers.1.mlp.up_proj": 9}},
    "alpha_pattern": {"r": 4, "target_modules": ALL_LINEAR, "alpha_pattern": {"^model.layers.0.*o_proj": 1, "k_proj": 40}},
    "layers_to_transform": {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "layers_pattern": {"r": 4, "target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "exclude": {"r": 4, "target_modules": ALL_LINEAR, "exclude_modules": ["o_proj"]},
    "expression": {"r": 4, "target_modules": r".*\.layers\.1\.mlp\.(up|down)_proj"},
    "all_linear": {"r": 4, "target_modules": "all-linear"},
    "head": {"r": 8, "target_modules": ["lm_head", "q_proj"]},
    "embedding": {"r": 5, "lora_alpha": 9, "target_modules": ["embed_tokens"]},
    "embedding_and_head": {"r": 3, "target_modules": ["embed_tokens", "lm_head", "v_proj"], "use_rslora": True},
    "lora_bias": {"r": 4, "target_modules": ["q_proj", "o_proj", "up_proj"], "lora_bias": True},
}


@pytest.mark.parametrize("rank", [1, 2, 7, 16, 33, 64, 256])
def test_every_rank_equals_peft(base, same, rank):
    llama = base()
    directory = llama.adapter(f"rank{rank}", seed=rank, r=rank, lora_alpha=2, target_modules=ALL_LINEAR)

    assert same(llama.ours(directory), llama.peft(directory)) < 1e-5
    assert same(llama.plain(), llama.peft(directory)) > 1e-3


def test_rank_beyond_the_limit_is_refused_with_both_numbers(base):
    llama = base()

    with pytest.raises(AdapterInvalidError, match=r"257.*256"):
        llama.verify(llama.adapter("rank257", r=257, target_modules=["q_proj"]))


@pytest.mark.parametrize("rank", [None, 1, 256], ids=["own", "rank1", "rank256"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_peft(base, same, kind, rank):
    llama = base()
    config = KINDS[kind] if rank is None else KINDS[kind] | {"r": rank}
    directory = llama.adapter(f"{kind}-{rank}", seed=len(kind), **config)

    assert same(llama.ours(directory), llama.peft(directory)) < 1e-5
    assert same(llama.plain(), llama.peft(directory)) > 1e-3


def test_lora_bias_on_biased_modules_equals_peft(base, same):
    qwen = base("qwen2")
    directory = qwen.adapter("lora_bias", r=4, target_modules=ALL_LINEAR, lora_bias=True)

    assert same(qwen.ours(directory), qwen.peft(directory)) < 1e-5


def test_embedding_of_a_tied_base_leaves_the_head_alone_as_peft_does(base, same):
    tied = base("llama-tied")
    directory = tied.adapter("embedding", r=4, target_modules=["embed_tokens"])

    assert same(tied.ours(directory), tied.peft(directory)) < 1e-5


def test_fan_in_fan_out_changes_nothing_for_linear_modules(base, same, edit_config):
    llama = base()
    directory = llama.adapter("fan", r=4, target_modules=["q_proj"])
    expected = llama.peft(directory)
    edit_config(directory, fan_in_fan_out=True)

    assert same(llama.ours(directory), expected) < 1e-5


def test_adapters_with_and_without_side_tensors_in_one_batch_keep_their_rows(base):
    llama = base()
    names = {
        "plain": llama.adapter("mix-plain", r=4, target_modules=ALL_LINEAR),
        "dora": llama.adapter("mix-dora", seed=2, r=4, target_modules=ALL_LINEAR, use_dora=True),
        "embedding": llama.adapter("mix-embedding", seed=3, r=4, target_modules=["embed_tokens", "q_proj"]),
        "bias": llama.adapter("mix-bias", seed=4, r=4, target_modules=["v_proj"], lora_bias=True),
    }
    ids = [[5, 9, 12, 33, 7], [8, 2, 40], [19, 19, 3, 4], [50, 6, 7, 8, 9, 10], [1, 2, 3]]
    requests = [((directory,), tokens) for directory, tokens in zip(names.values(), ids, strict=False)] + [((), ids[-1])]

    together = llama.batch(requests)

    for request, logits in zip(requests, together, strict=True):
        assert torch.equal(logits, llama.batch([request])[0])


def test_copy_of_an_embedding_that_differs_is_refused(base, refused):
    llama = base()
    directory = llama.adapter("trained-embedding", r=4, target_modules=["embed_tokens"])
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("base_layer.weight")]
    tensors[name] = tensors[name] + 0.5
    save_file(tensors, file)

    with pytest.raises(refused, match="differs from this base model's"):
        llama.ours(directory)


def test_added_tokens_are_refused(base):
    llama = base()
    directory = llama.adapter("added-tokens", r=4, target_modules=["embed_tokens"])
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("lora_embedding_A")]
    tensors[name] = torch.cat([tensors[name], tensors[name][:, :2]], dim=1)
    save_file(tensors, file)

    with pytest.raises(AdapterInvalidError, match="added tokens"):
        llama.verify(directory)


@pytest.mark.parametrize("rank", [1, 4, 256])
def test_ludwig_output_is_the_adapter_inside_it(base, same, tmp_path, rank):
    llama = base()
    inner = llama.adapter(f"for-ludwig-{rank}", r=rank, target_modules=["q_proj", "v_proj"])
    for part in ("model_weights", "model/model_weights"):
        outer = tmp_path / part.replace("/", "-")
        (outer / part).parent.mkdir(parents=True)
        (outer / part).mkdir()
        for file in inner.iterdir():
            (outer / part / file.name).write_bytes(file.read_bytes())
        (outer / "model_hyperparameters.json").write_text(json.dumps({"model_type": "llm"}))

        assert llama.verify(outer).adapter_id == llama.verify(inner).adapter_id
        assert same(llama.ours(outer), llama.peft(inner)) < 1e-5


def test_ludwig_directory_that_is_a_link_is_not_followed(base, tmp_path):
    llama = base()
    inner = llama.adapter("linked", r=4, target_modules=["q_proj"])
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "model_weights").symlink_to(inner)

    with pytest.raises(AdapterInvalidError, match=r"adapter_model\.safetensors is missing"):
        llama.verify(tmp_path / "outer")


def test_fused_modules_bind_to_their_parts(base, same, edit_config, tmp_path):
    """An adapter of a fused base: one A for q, k and v, and B's rows one after the other."""
    llama = base()
    generator = torch.Generator().manual_seed(8)
    split, fused = {}, {}
    sizes = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "gate_proj": 48, "up_proj": 48}
    for layer in range(2):
        for block, name, parts in (
            ("self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
            ("mlp", "gate_up_proj", ("gate_proj", "up_proj")),
        ):
            prefix = f"base_model.model.model.layers.{layer}.{block}."
            a = 0.2 * torch.randn(4, 32, generator=generator)
            bs = [0.2 * torch.randn(sizes[part], 4, generator=generator) for part in parts]
            fused[f"{prefix}{name}.lora_A.weight"], fused[f"{prefix}{name}.lora_B.weight"] = a, torch.cat(bs)
            for part, b in zip(parts, bs, strict=True):
                split[f"{prefix}{part}.lora_A.weight"], split[f"{prefix}{part}.lora_B.weight"] = a.clone(), b
    directories = {}
    for kind, tensors, targets in (("split", split, list(sizes)), ("fused", fused, ["qkv_proj", "gate_up_proj"])):
        directories[kind] = tmp_path / kind
        directories[kind].mkdir()
        save_file(tensors, directories[kind] / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": targets}
        (directories[kind] / "adapter_config.json").write_text(json.dumps(config))

    assert torch.equal(llama.ours(directories["fused"]), llama.ours(directories["split"]))
    assert same(llama.ours(directories["fused"]), llama.peft(directories["split"])) < 1e-5
    assert llama.verify(directories["fused"]).adapter_id != llama.verify(directories["split"]).adapter_id


def test_fused_module_beside_its_part_is_refused(base, tmp_path):
    llama = base()
    prefix = "base_model.model.model.layers.0.self_attn."
    tensors = {
        f"{prefix}qkv_proj.lora_A.weight": torch.ones(4, 32),
        f"{prefix}qkv_proj.lora_B.weight": torch.ones(64, 4),
        f"{prefix}q_proj.lora_A.weight": torch.ones(4, 32),
        f"{prefix}q_proj.lora_B.weight": torch.ones(32, 4),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))

    with pytest.raises(AdapterInvalidError, match="two of the adapter's modules are"):
        llama.verify(tmp_path)
