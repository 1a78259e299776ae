"""Which attention backend runs on which machine; the facts are injected."""

import dataclasses
import re
import sys

import pytest
import torch

from node.errors import ConfigError
from node.kernels.attention.paged import AttentionShape, ShortBound
from node.kernels.attention.registry import AttentionFacts, choose, open_attention

LLAMA = AttentionShape(32, 8, 128, 64, torch.bfloat16, 128**-0.5, 256, 8192)
EVERYTHING = AttentionFacts((9, 0), has_native=True, has_fa3=True, has_fa2=True, has_varlen=True, has_triton=True)


def shape(**values):
    return dataclasses.replace(LLAMA, **values)


def facts(**values):
    return dataclasses.replace(EVERYTHING, **values)


@pytest.mark.parametrize(
    ("model", "machine", "expected"),
    [
        (LLAMA, EVERYTHING, "native+fa3"),
        (LLAMA, facts(has_fa3=False), "native+triton"),  # FA2 and varlen take blocks of 256 tokens
        (shape(block_size=256), facts(has_fa3=False), "native+fa2"),
        (shape(block_size=256), facts(has_fa3=False, has_fa2=False), "native+varlen"),
        (LLAMA, facts(has_native=False), "fa3"),
        (LLAMA, facts(has_triton=False), "fa3"),  # native's plan is made with it
        (LLAMA, facts(capability=(8, 0)), "native+triton"),
        (shape(head_dim=80), EVERYTHING, "fa3"),
        (shape(heads=32, groups=1), EVERYTHING, "fa3"),
        (shape(block_size=48), EVERYTHING, "fa3"),
        (shape(block_size=128), EVERYTHING, "native+triton"),
        (shape(dtype=torch.float32), EVERYTHING, "triton"),
        (shape(head_dim=512), EVERYTHING, "triton"),
    ],
)
def test_auto_takes_the_first_that_can_run(model, machine, expected):
    assert choose("auto", model, machine).name == expected


def test_deterministic_takes_the_own_kernels_in_triton():
    assert choose("auto", LLAMA, EVERYTHING, is_deterministic=True).name == "triton"


@pytest.mark.parametrize(("setting", "expected"), [("fa3", "fa3"), ("triton", "triton"), ("native", "native+fa3")])
def test_setting_that_can_run_is_taken(setting, expected):
    assert choose(setting, LLAMA, EVERYTHING).name == expected


@pytest.mark.parametrize("setting", ["native", "fa3", "fa2", "varlen", "triton"])
def test_setting_that_cannot_run_is_refused_with_the_reason(setting):
    nothing = AttentionFacts((7, 5), has_native=False, has_fa3=False, has_fa2=False, has_varlen=False, has_triton=False)
    with pytest.raises(ConfigError, match=f"engine.attention = '{setting}' cannot run: .+ Use 'auto'"):
        choose(setting, LLAMA, nothing)
    with pytest.raises(ConfigError, match="No attention backend can run"):
        choose("auto", LLAMA, nothing)


def test_choice_says_why_and_what_would_be_faster():
    choice = choose("auto", LLAMA, facts(has_fa3=False))
    assert choice.reason.startswith("fa3: flash-attn 3 is not installed; fa2: its cache blocks")
    assert "flash_attn_interface" in choice.faster
    assert choose("auto", LLAMA, EVERYTHING).faster == ""
    assert choose("auto", LLAMA, facts(has_fa3=False, capability=(8, 0))).faster == ""


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        ([(1, 100_000)] * 3, True),  # decode's, whatever their context
        ([(1, 9000), (50, 100)], True),
        ([(1, 9000)] * 151 + [(50, 100)], False),
        ([(2, 101)], False),
        ([(50, 100), (50, 100)], True),
        ([(50, 100), (51, 100)], False),
        ([], True),
    ],
)
def test_short_step_has_few_pairs_and_no_long_chunk(sequences, expected):
    assert ShortBound(rows=200, context=100, pairs=10_000).holds(sequences) is expected


def test_backend_that_cannot_be_imported_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("node.kernels.attention.registry.attention_facts", lambda device: facts(has_native=False))
    monkeypatch.setitem(sys.modules, "node.kernels.attention.fa3", None)  # an import of it raises ImportError
    with pytest.raises(
        ConfigError, match=f"'fa3' is installed and cannot be imported under torch {re.escape(torch.__version__)}"
    ):
        open_attention("auto", LLAMA, torch.device("cpu"))
