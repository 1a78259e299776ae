from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from node.models.rope import inverse_frequencies, rope_tables
from node.models.rope_config import rope_config

VARIANTS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-untruncated": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "truncate": False},
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 0.7,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.707,
        "mscale_all_dim": 1.1,
    },
    "yarn-betas": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16, "beta_slow": 2},
    "yarn-implied-lengths": {"rope_type": "yarn", "factor": 4.0},
}


def theirs(variant, position_count, theta=10_000.0, head_dim=32, trained_len=512):
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=trained_len,
        rope_parameters={"rope_theta": theta, **VARIANTS[variant]},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(position_count)[None])
    return cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rope_tables_every_type_equals_transformers(variant, theta):
    rope = rope_config({"rope_parameters": {"rope_theta": theta, **VARIANTS[variant]}}, 32, 512)

    cos, sin = rope_tables(rope, 512)

    for ours, reference in zip((cos, sin), theirs(variant, 512, theta), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)


def test_rope_tables_dynamic_beyond_trained_length_equals_transformers_over_that_length():
    rope = rope_config({"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 32, 512)

    stretched, plain = rope_tables(rope, 900)[0], rope_tables(rope, 512)[0]

    torch.testing.assert_close(stretched, theirs("dynamic", 900)[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(plain, theirs("default", 512)[0], atol=1e-4, rtol=0)
    assert (stretched[:512] - plain).abs().max() > 0.1


def test_rope_tables_frequency_factors_divide_frequencies():
    rope = rope_config({"rope_theta": 5e5}, 32, 512)
    llama3 = rope_config({"rope_parameters": {"rope_theta": 5e5, **VARIANTS["llama3"]}}, 32, 512)
    factors = inverse_frequencies(rope, 512)[0] / inverse_frequencies(llama3, 512)[0]

    ours = rope_tables(rope, 512, factors)

    for got, reference in zip(ours, rope_tables(llama3, 512), strict=True):
        torch.testing.assert_close(got, reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ["linear", "llama3", "yarn", "dynamic"])
def test_forward_with_rope_variant_equals_transformers(variant, make_tiny, load, drive, prompts, mixed_schedule, error):
    parameters = {"rope_theta": 10_000.0, **VARIANTS[variant]}
    tiny = make_tiny("mistral-sliding", rope_parameters=parameters, max_position_embeddings=256)
    driver = drive(load(tiny.directory))
    for name, ids in prompts.items():
        driver.add(name, ids)

    logits = driver.run(mixed_schedule({name: len(ids) for name, ids in prompts.items()}))

    for name, ids in prompts.items():
        assert error(logits[name], tiny.logits(ids)) < 1e-4


def test_forward_dynamic_rope_beyond_trained_length_equals_transformers(make_tiny, load, drive, error):
    tiny = make_tiny("llama", rope_parameters={"rope_theta": 1e4, **VARIANTS["dynamic"]}, max_position_embeddings=16)
    driver = drive(load(tiny.directory, max_model_len=30))
    ids = [(7 * i) % 97 for i in range(30)]
    driver.add("long", ids)

    logits = driver.run([{"long": 11}, {"long": 19}])["long"]

    assert error(logits, tiny.logits(ids)) < 1e-4
