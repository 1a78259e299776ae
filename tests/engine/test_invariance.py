"""What scripts/bench_invariance.py compares, on the tiny model: the bits of every logit, whatever else the engine does."""

import sys
from pathlib import Path

import pytest

from node.config import AdapterSettings, EngineSettings, ModelSettings
from node.engine.engine import open_engine

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ((), (("x", 1.0),), (("y", 1.0),), (("z", 1.0),), (("y", 0.7), ("x", -0.4)))


@pytest.fixture(scope="module")
def bench():
    """The script as a module."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import bench_invariance
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return bench_invariance


@pytest.fixture
def questions(bench, driver):
    recipes = [tuple(driver.term(name, weight) for name, weight in recipe) for recipe in RECIPES]
    prompts = [(1, *(((11 * i + 7 * k) % 90) + 5 for k in range(3 + 5 * i))) for i in range(12)]
    return [bench.Question(prompt, recipes[i % len(recipes)], 12) for i, prompt in enumerate(prompts)]


@pytest.fixture
def open_with(world, tmp_path):
    def open_it(dtype):
        def build(settings, watch):
            model = ModelSettings(path=str(world.model_dir), dtype=dtype)
            return open_engine(
                model, EngineSettings(**settings), AdapterSettings(memory_bytes=4 << 20), tmp_path, watch_logits=watch
            )

        return build

    return open_it


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_logits_and_tokens_are_the_same_whatever_the_engine_does(bench, driver, questions, open_with, dtype, kernels):
    settings = {"threads": 1, "kv_cache_bytes": 1 << 20, "kv_block_size": 4, "kernels": kernels}

    found = list(bench.rows(settings, questions, driver.engine.ready, open_with(dtype)))

    assert [row["row"] for row in found] == 2 * ["batch", "preempted", "warm", "chunks"]
    for row in found[:4]:
        assert row["deterministic"]
        assert row["ok"], str(row)
        assert row["equal_logits"] == row["equal_answers"] == len(questions)
    assert found[1]["preemptions"] > 0
    assert found[2]["cached_prompt_tokens"] > 0


def test_one_other_bit_is_noticed(bench, questions, driver):
    one = [bench.Answer([5], [b"a"]) for _ in questions]
    other = [bench.Answer([5], [b"a"]) for _ in questions]
    other[3].logits = [b"b"]
    row = bench.compare(bench.Mode("batch", {}), True, one, other, driver.engine.stats())
    assert (row["equal_logits"], row["equal_answers"], row["ok"]) == (len(questions) - 1, len(questions), False)


def test_mode_that_did_not_happen_is_a_failure(bench, questions, driver):
    same = [bench.Answer([5], [b"a"]) for _ in questions]
    for mode in (bench.Mode("preempted", {}), bench.Mode("warm", {}, is_warm=True)):
        assert not bench.compare(mode, True, same, same, driver.engine.stats())["ok"]
