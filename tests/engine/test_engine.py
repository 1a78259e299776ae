"""The whole engine on one thread, with a real model: batches, preemption, prefixes and adapters never change an answer."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from node.engine.engine import FAILED_STEPS_LIMIT
from node.errors import ModelLoadError
from node.request import AdapterTerm

VOCAB = 101  # of the tiny model
PROMPTS = {f"s{i}": [1, *(((7 * i + 3 * k) % 90) + 5 for k in range(5 + 4 * i))] for i in range(6)}
ADAPTERS = {"s0": (), "s1": ("x",), "s2": ("y",), "s3": ("z",), "s4": ("x", "z"), "s5": ()}


# Elements of one rank: two layers of q 128, k 96, v 96, o 128, gate, up and down 160 each, and lm_head 165; 8 ranks of float32.
PAGE_BYTES = (2 * (128 + 96 + 96 + 128 + 3 * 160) + 165) * 8 * 4


def block_bytes(count):
    """KV bytes for `count` blocks of 4 tokens of the tiny model in float32."""
    return count * 2 * 2 * 2 * 16 * 4 * 4


def answers(driver, names=PROMPTS, **sampling):
    for name in names:
        driver.add(name, PROMPTS[name], ADAPTERS[name], **{"max_new_tokens": 12, **sampling})
    driver.run()
    return {name: driver.tokens(name) for name in names}


def test_mixed_batch_equals_transformers_and_peft(driver, world):
    ours = answers(driver, ["s0", "s1", "s2", "s3"])
    for name in ours:
        reference = LlamaForCausalLM.from_pretrained(world.model_dir).eval()
        if ADAPTERS[name]:
            reference = PeftModel.from_pretrained(reference, world.adapters[ADAPTERS[name][0]]).eval()
        prompt = torch.tensor([PROMPTS[name]])
        expected = reference.generate(input_ids=prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert ours[name] == expected[0, prompt.shape[1] :].tolist()


def test_one_decode_step_holds_three_adapters(driver):
    names = ["s1", "s2", "s3"]
    for name in names:
        answers(driver, [name])  # all three are resident then, so that all three start together
    assert driver.engine.stats().max_adapters_in_one_step == 1
    answers(driver, names)
    assert driver.engine.stats().max_adapters_in_one_step == 3


def test_adapters_change_the_answer(driver):
    for name, terms in (("base", ()), ("x", ("x",)), ("y", ("y",))):
        driver.add(name, PROMPTS["s3"], terms)
    driver.run()
    assert len({tuple(driver.tokens(name)) for name in ("base", "x", "y")}) == 3


def test_steps_with_adapters_say_when_they_pass_their_middle(driver):
    passed = []
    driver.engine._adapters.tensors.halfway = lambda: passed.append(1)
    answers(driver, ["s0"])
    assert not passed
    before = driver.engine.stats().steps_total
    answers(driver, ["s1"])
    assert len(passed) == driver.engine.stats().steps_total - before > 0


def test_weight_zero_equals_the_base(driver):
    driver.add("base", PROMPTS["s3"])
    driver.add("zero", PROMPTS["s3"], [driver.term("y", 0.0)])
    driver.run()
    assert driver.tokens("zero") == driver.tokens("base")


@pytest.mark.parametrize(
    "change",
    [
        {"kv_cache_bytes": block_bytes(14)},
        {"max_batch_tokens": 16},
        {"max_sequences": 1},
        {"prefix_cache": False},
        {"adapters": {"page_rank": 4}},
    ],
    ids=["preempted", "chunked", "alone", "no-prefix", "small-pages"],
)
def test_answers_do_not_depend_on_the_schedule(make_driver, change):
    sampling = {"temperature": 0.9, "top_p": 0.95, "seed": 5, "logprobs": 2}
    plain, changed = make_driver(deterministic=True), make_driver(deterministic=True, **change)
    assert answers(plain, **sampling) == answers(changed, **sampling)
    for name in PROMPTS:
        tokens = [[token for event in side.events[name] for token in event.tokens] for side in (plain, changed)]
        if "adapters" not in change:
            assert tokens[0] == tokens[1]  # log-probabilities too, to the last bit
    if "kv_cache_bytes" in change:
        assert changed.engine.stats().preemptions_total > 0
    assert changed.engine.stats().kv_blocks_used == 0


def test_warm_prefix_gives_the_same_bits(make_driver):
    driver = make_driver(deterministic=True)
    for name in ("cold", "warm"):
        driver.add(name, PROMPTS["s5"], ["y"], max_new_tokens=10, logprobs=3)
        driver.run()
    assert driver.events["warm"][0].cached_prompt_tokens == 24
    assert [e.tokens for e in driver.events["warm"]] == [e.tokens for e in driver.events["cold"]]


def test_choices_share_the_prompt_and_differ(driver):
    for choice in range(3):
        driver.add(f"c{choice}", PROMPTS["s5"], temperature=1.5, seed=3, choice_index=choice, max_new_tokens=10)
    driver.run()
    assert len({tuple(driver.tokens(f"c{choice}")) for choice in range(3)}) == 3


def test_prompt_logprobs_equal_transformers(driver, world):
    driver.add("a", PROMPTS["s4"], prompt_logprobs=True, max_new_tokens=1)
    driver.run()
    ids = torch.tensor([PROMPTS["s4"]])
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(world.model_dir).eval()(ids).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
    found = driver.events["a"][0].prompt_logprobs
    assert found[0] is None
    assert [token.token_id for token in found[1:]] == list(PROMPTS["s4"][1:])
    assert np.allclose([token.logprob for token in found[1:]], expected, atol=1e-4)


def test_prompt_alternatives_equal_transformers(driver, world):
    driver.add("a", PROMPTS["s4"], prompt_logprobs=True, prompt_top=3, max_new_tokens=0)
    driver.run()
    ids = torch.tensor([PROMPTS["s4"]])
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(world.model_dir).eval()(ids).logits[0].log_softmax(-1)
    expected = torch.topk(logits[:-1], 3, dim=1)
    found = [token.top for token in driver.events["a"][0].prompt_logprobs[1:]]
    assert [[item.token_id for item in top] for top in found] == expected.indices.tolist()
    assert np.allclose([[item.logprob for item in top] for top in found], expected.values.numpy(), atol=1e-4)


def test_prompt_logprobs_with_small_chunks_are_complete(make_driver):
    driver = make_driver(max_batch_tokens=16)
    for name in ("s4", "s5"):
        driver.add(name, PROMPTS[name], prompt_logprobs=True, max_new_tokens=2)
    driver.run()
    for name in ("s4", "s5"):
        assert len(driver.events[name][0].prompt_logprobs) == len(PROMPTS[name])


def test_more_adapters_than_memory_take_turns(make_driver):
    driver = make_driver(adapters={"memory_bytes": 4 * PAGE_BYTES})  # x and y take one page each, z three
    expected = answers(make_driver())
    assert answers(driver) == expected
    stats = driver.engine.stats()
    assert stats.adapter_evictions_total > 0
    assert stats.adapter_slots == 4


def test_adapter_failure_gives_only_that_sequence_an_error(driver, tmp_path):
    driver.add("bad", PROMPTS["s1"], [AdapterTerm("0" * 64, str(tmp_path / "nowhere"), 1.0)])
    driver.add("wrong", PROMPTS["s1"], [AdapterTerm("0" * 64, str(driver.world.adapters["x"]), 1.0)])
    driver.add("good", PROMPTS["s1"], ["x"])
    driver.run()
    assert driver.last("bad").finish_reason == "error"
    assert driver.last("good").finish_reason == "length"


def test_adapter_with_other_bytes_than_its_hash_is_refused(driver):
    driver.add("wrong", PROMPTS["s1"], [AdapterTerm("0" * 64, str(driver.world.adapters["x"]), 1.0)])
    driver.run()
    assert driver.last("wrong").error_code == "adapter_digest_mismatch"
    driver.add("right", PROMPTS["s1"], ["x"])
    driver.run()
    assert driver.last("right").finish_reason == "length"


def test_adapter_larger_than_memory_is_refused_with_both_numbers(make_driver):
    driver = make_driver(adapters={"memory_bytes": 60_000, "page_rank": 4})
    driver.add("a", PROMPTS["s1"], ["z"])
    driver.run()
    last = driver.last("a")
    assert last.error_code == "adapter_too_large"
    assert "5 pages" in last.error_message
    assert f"{driver.engine.stats().adapter_slots} pages" in last.error_message


class Fragile:
    """A model that cannot bear one token id."""

    def __init__(self, model, token_id):
        self._model = model
        self._token_id = token_id

    def forward(self, inputs, kv, pool):
        if (inputs.token_ids == self._token_id).any():
            raise RuntimeError("this token breaks the model")
        return self._model.forward(inputs, kv, pool)


@pytest.fixture
def break_on(driver, monkeypatch):
    """Make the driver's model fail on every step that holds `token_id`."""
    runner = driver.engine._runner
    return lambda token_id: monkeypatch.setattr(runner, "_model", Fragile(runner._model, token_id))


def test_step_that_fails_ends_only_the_sequence_at_fault(driver, break_on, caplog):
    names = ["s0", "s3", "s4"]
    expected = answers(driver, names)
    driver.events.clear()
    break_on(99)  # in no prompt and no answer above
    assert not any(99 in [*PROMPTS[name], *expected[name]] for name in names)
    driver.add("bad", [1, 99, 7])
    assert answers(driver, names) == expected
    assert driver.last("bad").error_code == "engine_failed"
    assert "breaks the model" in caplog.text  # the operator reads why
    assert "breaks the model" not in driver.last("bad").error_message
    assert driver.engine.stats().kv_blocks_used == 0


def test_engine_that_computes_nothing_any_more_gives_up(driver, break_on):
    break_on(1)
    for index in range(FAILED_STEPS_LIMIT - 1):
        driver.add(f"a{index}", [1, 5])
        driver.run()
        assert driver.last(f"a{index}").error_code == "engine_failed"
    driver.add("last", [1, 5])
    with pytest.raises(RuntimeError):
        driver.run()


def test_engine_that_recovers_forgets_its_failures(driver, break_on):
    break_on(1)
    for index in range(3 * FAILED_STEPS_LIMIT):
        driver.add(f"bad{index}", [1, 5])
        driver.run()
        driver.add(f"good{index}", [5, 6], max_new_tokens=1)
        driver.run()
        assert driver.last(f"good{index}").finish_reason == "length"


@pytest.mark.parametrize("token_id", [-1, VOCAB, 10**9])
def test_prompt_with_an_unknown_token_is_refused_by_name(driver, token_id):
    driver.add("bad", [1, token_id])
    assert driver.last("bad").error_code == "invalid_request"
    assert str(token_id) in driver.last("bad").error_message


def test_non_finite_adapter_weight_leaves_the_next_sequence_sound(make_driver):
    """Its keys and values are not finite either, and stay in the blocks that the next sequence gets."""
    expected = answers(make_driver(), ["s1"])
    driver = make_driver(kv_cache_bytes=block_bytes(10))
    driver.add("bad", PROMPTS["s5"], [driver.term("x", 3e38)])
    driver.run()
    assert driver.last("bad").error_code == "engine_failed"
    assert answers(driver, ["s1"]) == expected


def test_cancel_frees_blocks(driver):
    driver.add("a", PROMPTS["s5"], ["y"], max_new_tokens=100)
    while driver.engine.stats().kv_blocks_used == 0:
        driver.record(driver.engine.step()[0])
    driver.record(driver.engine.cancel("a"))
    assert driver.last("a").finish_reason == "cancelled"
    assert driver.engine.stats().kv_blocks_used == 0
    assert not driver.engine.has_work


def test_unknown_model_is_refused_at_start(make_driver, tmp_path):
    with pytest.raises(ModelLoadError):
        make_driver(model=tmp_path / "nothing")
