from __future__ import annotations

import json
import math

import pytest
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from node.adapters.lora_config import ScaleTable, parse_lora_config

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
