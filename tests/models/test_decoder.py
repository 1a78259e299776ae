from __future__ import annotations

import pytest
import torch

from node.kernels.head_rows import select_rows
from node.kernels.lora import LoraRows
from node.kernels.torch_kernels import TorchKernels

FAMILIES = [
    "llama",
    "llama-tied",
    "llama-biased",
    "llama-wide-heads",
    "mistral",
    "mistral-sliding",
    "qwen2",
    "qwen2-sliding",
    "qwen3",
    "qwen3-biased-sliding",
    "phi3",
    "phi3-sliding",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_each_family_equals_transformers(family, make_tiny, load, kernels, drive, prompts, mixed_schedule, error):
    tiny = make_tiny(family)
    loaded = load(tiny.directory, kernels=kernels)
    whole, chunked = drive(loaded), drive(loaded)
    for name, ids in prompts.items():
        whole.add(name, ids)
        chunked.add(name, ids)
    lengths = {name: len(ids) for name, ids in prompts.items()}

    for logits in (whole.run([lengths]), chunked.run(mixed_schedule(lengths))):
        for name, ids in prompts.items():
            assert logits[name].dtype == torch.float32
            assert error(logits[name], tiny.logits(ids)) < 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_each_family_equals_transformers_generate(family, make_tiny, load, kernels, drive, prompts):
    tiny = make_tiny(family)
    driver = drive(load(tiny.directory, kernels=kernels))
    for name, ids in prompts.items():
        driver.add(name, ids)

    answers = driver.greedy(14)

    for name, ids in prompts.items():
        prompt = torch.tensor([ids])
        reference = tiny.reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=14, eos_token_id=-1, pad_token_id=0
        )
        assert answers[name] == reference[0, len(ids) :].tolist(), name


def test_forward_bfloat16_stays_near_float32(make_tiny, load, kernels, drive, prompts, error):
    tiny = make_tiny("llama")
    driver = drive(load(tiny.directory, kernels=kernels, dtype=torch.bfloat16))
    driver.add("a", prompts["a"])

    logits = driver.run([{"a": len(prompts["a"])}])["a"]

    ours = error(logits, tiny.logits(prompts["a"]))
    tiny.reference.to(torch.bfloat16)
    theirs = error(tiny.logits(prompts["a"]), logits)
    assert 0 < ours < 0.05
    assert theirs < 0.05


def test_forward_only_wanted_rows_returns_those_rows(tiny_llama, load, kernels, drive, prompts):
    driver, other = drive(load(tiny_llama.directory, kernels=kernels)), drive(load(tiny_llama.directory, kernels=kernels))
    driver.add("a", prompts["a"])
    other.add("a", prompts["a"])
    everything = driver.step({"a": 29})["a"]
    inputs = other.inputs({"a": 29})
    inputs.logit_rows = torch.tensor([28, 3])

    logits = other.forward(inputs)

    torch.testing.assert_close(logits, everything[[28, 3]])


def test_forward_no_wanted_row_still_writes_keys(tiny_llama, load, kernels, drive, prompts):
    driver = drive(load(tiny_llama.directory, kernels=kernels))
    driver.add("a", prompts["a"])
    inputs = driver.inputs({"a": 29})
    inputs.logit_rows = torch.empty(0, dtype=torch.int64)

    logits = driver.forward(inputs)

    assert logits.shape == (0, 97)
    assert all((keys != 1e4).any() for keys in driver.kv.keys)


class CountingKernels(TorchKernels):
    """Notes the rows of every product."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def linear(self, x, *arguments, **options):
        self.counts.append(x.shape[0])
        return super().linear(x, *arguments, **options)


@pytest.mark.parametrize(("wanted", "behind"), [([28, 3], [2] * 4), ([], [])], ids=["two", "none"])
def test_forward_behind_the_last_attention_computes_wanted_rows_alone(tiny_llama, load, drive, prompts, wanted, behind):
    kernels = CountingKernels()
    loaded = load(tiny_llama.directory, kernels=kernels)
    driver = drive(loaded)
    driver.add("a", prompts["a"])
    inputs = driver.inputs({"a": 29})
    inputs.logit_rows = torch.tensor(wanted, dtype=torch.int64)

    driver.forward(inputs)

    before = 4 * loaded.spec.layer_count - 3  # of the last layer q, k and v alone
    assert kernels.counts == [29] * before + behind  # o, gate and up, down, the vocabulary


def test_hidden_rows_count_among_the_wanted_ones(tiny_llama, load, kernels, drive, prompts):
    tiny, driver = tiny_llama, drive(load(tiny_llama.directory, kernels=kernels))
    driver.add("a", prompts["a"])
    inputs = driver.inputs({"a": 29})
    inputs.logit_rows, inputs.hidden_rows = torch.tensor([28, 11, 3]), torch.tensor([2, 0])

    driver.forward(inputs)

    with torch.no_grad():
        states = tiny.reference(torch.tensor([prompts["a"]]), output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(inputs.hidden, states[[3, 28]], rtol=2e-4, atol=2e-4)


def test_select_rows_keeps_terms_and_their_order():
    rows = LoraRows(
        row_start=torch.tensor([0, 2, 2, 3, 6], dtype=torch.int32),
        slot=torch.tensor([5, 1, 7, 2, 3, 4], dtype=torch.int32),
        weight=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
    )

    chosen = select_rows(rows, torch.tensor([3, 1, 0]))

    assert chosen.row_start.tolist() == [0, 3, 3, 5]
    assert chosen.slot.tolist() == [2, 3, 4, 5, 1]
    assert chosen.weight.tolist() == pytest.approx([0.4, 0.5, 0.6, 0.1, 0.2])
    assert chosen.row_start.dtype == torch.int32
