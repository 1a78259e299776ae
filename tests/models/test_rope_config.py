from __future__ import annotations

import pytest

from node.errors import ModelLoadError
from node.models.rope_config import rope_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def test_rope_config_old_and_new_spelling_agree():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}

    assert rope_config(old, 64, 2048) == rope_config(new, 64, 2048)
    assert rope_config({}, 64, 2048).theta == 10_000.0


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({}, 512),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 2048),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 1024),
        ({"rope_scaling": {**YARN, "factor": 8.0}}, 1024),
        ({"rope_scaling": {**YARN, "factor": 2.0}}, 512),
    ],
)
def test_rope_config_longest_length_follows_the_factor(config, longest):
    assert rope_config(config, 64, 512).longest_len == longest


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "longrope"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "mrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_parameters": [1]}, "object"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "0.5"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "two"),
        ({"rope_theta": 0.5}, "rope_theta"),
        ({"rope_theta": True}, "rope_theta"),
        ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 32}}, "beta_fast"),
        ({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}}, "high_freq_factor"),
    ],
)
def test_rope_config_unusable_is_refused_by_name(config, named):
    with pytest.raises(ModelLoadError) as caught:
        rope_config(config, 64, 512)

    assert named in caught.value.message
    assert caught.value.error_code == "model_unsupported"


def test_rope_config_odd_head_is_refused():
    with pytest.raises(ModelLoadError, match="head_dim is 33"):
        rope_config({}, 33, 512)
