from __future__ import annotations

import pytest
from transformers import LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

from node.errors import ModelLoadError
from node.kernels.layout import PageLayout
from node.models.spec import model_spec

LLAMA = LlamaConfig(num_hidden_layers=2, num_key_value_heads=8, vocab_size=1000).to_dict()


@pytest.mark.parametrize(
    "config", [LlamaConfig(), MistralConfig(), Qwen2Config(), Qwen3Config(), Phi3Config()], ids=lambda c: c.model_type
)
def test_model_spec_defaults_equal_transformers(config):
    """A config.json may leave out what equals the class's default; only `model_type` and the sizes are always there."""
    sizes = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    short = {"model_type": config.model_type, **{key: getattr(config, key) for key in sizes}}

    full, brief = model_spec(config.to_dict(), None), model_spec(short, None)

    assert brief.head_dim == full.head_dim
    assert (brief.rms_norm_eps, brief.rope, brief.windows) == (full.rms_norm_eps, full.rope, full.windows)
    assert brief.eos_token_ids == full.eos_token_ids


def test_model_spec_qwen_windows_start_at_max_window_layers():
    config = Qwen2Config(num_hidden_layers=4, use_sliding_window=True, sliding_window=100, max_window_layers=3).to_dict()

    assert model_spec(config, None).windows == (None, None, None, 100)
    assert model_spec({**config, "use_sliding_window": False}, None).windows == (None,) * 4


def test_model_spec_linears_lay_out_a_page():
    spec = model_spec(LLAMA, None)
    layout = PageLayout(spec.linears, 8)

    assert layout.module_count == 2 * 7 + 1
    assert layout.spans["model.layers.1.mlp.down_proj"].in_features == LLAMA["intermediate_size"]
    assert layout.spans["model.layers.0.self_attn.k_proj"].out_features == 8 * 128
    assert [kind.name for kind in spec.linear_kinds][-1] == "lm_head"
    assert {kind.layer_count for kind in spec.linear_kinds} == {1, 2}


def test_model_spec_eos_ids_of_both_files_are_joined():
    assert model_spec({**LLAMA, "eos_token_id": [7, 2]}, None, (9, 7)).eos_token_ids == (2, 7, 9)
    assert model_spec({**LLAMA, "eos_token_id": None}, None).eos_token_ids == ()


@pytest.mark.parametrize(("trained", "asked", "served"), [(2048, None, 2048), (131072, None, 8192), (131072, 100_000, 100_000)])
def test_model_spec_served_length(trained, asked, served):
    assert model_spec({**LLAMA, "max_position_embeddings": trained}, asked).max_model_len == served


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": "mixtral"}, "mixtral"),
        ({"model_type": None}, "None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
        ({"num_key_value_heads": 5}, "multiple"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "1 entries"),
    ],
)
def test_model_spec_unsupported_is_refused_by_name(changes, named):
    with pytest.raises(ModelLoadError) as caught:
        model_spec({**LLAMA, **changes}, None)

    assert named in caught.value.message
    assert caught.value.error_code == "model_unsupported"


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_model_spec_phi_with_a_long_rotation_is_refused(kind):
    """Early checkpoints call Phi's own rotation yarn, which it is not."""
    scaling = {"type": kind, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = Phi3Config().to_dict() | {"rope_scaling": scaling, "rope_parameters": None, "original_max_position_embeddings": 2048}

    with pytest.raises(ModelLoadError, match="rope_type"):
        model_spec(config, None)


def test_model_spec_longer_than_trained_is_refused():
    with pytest.raises(ModelLoadError, match="3000 tokens and this model reaches 2048"):
        model_spec(LLAMA, 3000)
