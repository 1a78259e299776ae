from __future__ import annotations

import json
import math

import pytest
from peft import LoraConfig, PeftType
from peft.utils.other import get_pattern_key

from node.adapters.lora_config import ScaleTable, parse_lora_config
from node.errors import AdapterInvalidError

MODULES = [f"model.layers.{layer}.{kind}" for layer in (0, 1, 11) for kind in ("self_attn.q_proj", "mlp.down_proj")]


def _parse(**fields):
    return parse_lora_config(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16} | fields).encode(), 256)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"q_proj": 4},
        {"model.layers.1.self_attn.q_proj": 2, "q_proj": 4},
        {"q_proj": 4, "model.layers.1.self_attn.q_proj": 2},
        {r"layers\.1\..*": 2},
        {r"^model\.layers\.\d+\.mlp\.(up|down)_proj": 32},
        {"1.self_attn.q_proj": 2},
        {"proj": 2},
        {"layers.[01].mlp.down_proj|x": 2},
        {"a)|(model": 2},
    ],
)
def test_scale_any_pattern_is_the_one_peft_uses(patterns, use_rslora):
    config = _parse(
        rank_pattern=patterns, alpha_pattern={key: 3 * value for key, value in patterns.items()}, use_rslora=use_rslora
    )
    table = ScaleTable(config)

    for module in MODULES:
        key = get_pattern_key(patterns.keys(), module)
        rank, alpha = patterns.get(key, 8), 3 * patterns[key] if key in patterns else 16
        assert table.of(module).rank == rank
        assert table.of(module).scale == alpha / (math.sqrt(rank) if use_rslora else rank)


def test_parse_everything_peft_writes_by_default_is_accepted(tmp_path):
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)

    config = parse_lora_config((tmp_path / "adapter_config.json").read_bytes(), 256)

    assert (config.rank, config.alpha, config.target_modules, config.use_rslora) == (4, 8.0, ("q_proj",), False)


def test_parse_missing_rank_and_alpha_takes_pefts_defaults():
    config = parse_lora_config(b'{"peft_type": "LORA"}', 256)

    assert (config.rank, config.alpha) == (LoraConfig().r, LoraConfig().lora_alpha)


@pytest.mark.parametrize("value", [None, False, {}, [], ""])
def test_parse_unknown_field_that_is_off_is_accepted(value):
    assert _parse(invented_later=value).rank == 8


@pytest.mark.parametrize("kind", sorted({kind.value for kind in PeftType} - {"LORA"}))
def test_parse_every_other_kind_of_peft_is_refused_by_name(kind):
    with pytest.raises(AdapterInvalidError, match=kind) as caught:
        _parse(peft_type=kind)

    assert caught.value.error_code == "adapter_feature_unsupported"


@pytest.mark.parametrize(
    "field",
    [
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"trainable_token_indices": {"embed_tokens": [1]}},
        {"alora_invocation_tokens": [5]},
        {"layer_replication": [[0, 2]]},
        {"target_parameters": ["mlp.experts"]},
        {"ensure_weight_tying": True},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"arrow_config": {"top_k": 2}},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "lora_ga"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_parse_features_that_are_not_served_are_refused_by_name(field):
    with pytest.raises(AdapterInvalidError, match=next(iter(field))) as caught:
        _parse(**field)

    assert caught.value.error_code == "adapter_feature_unsupported"


def test_parse_what_peft_writes_for_a_plain_adapter_is_accepted():
    config = _parse(**{key: value for key, value in LoraConfig(r=8).to_dict().items() if key != "peft_type"})

    assert (config.rank, config.use_dora, config.has_lora_bias) == (8, False, False)
