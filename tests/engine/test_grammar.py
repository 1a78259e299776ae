"""Grammars over a vocabulary of 256 bytes and a few longer tokens: masks, advances, failures, limits."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from node.engine.grammar import Vocabulary, explain, mask_width
from node.engine.grammar_cache import GrammarCache
from node.engine.grammar_masks import GrammarMasks
from node.engine.messages import SequenceEvent, Submit
from node.errors import GrammarError
from node.request import DrawnToken, Sampling

VOCAB = 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate(alphabet)}
    merges = [("y", "e"), ("ye", "s"), ("n", "o")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return made, path


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    made, path = tokenizer
    return Vocabulary(path, VOCAB, [made.token_to_id("<|end|>")])


@pytest.fixture
def masks(vocabulary):
    made = GrammarMasks(lambda: vocabulary, lambda: None)
    yield made
    made.close()


def submit(sequence_id, grammar, tenant="t"):
    return Submit(
        sequence_id=sequence_id, tenant=tenant, prompt_ids=(1,), terms=(), sampling=Sampling(max_new_tokens=9), grammar=grammar
    )


def settle(masks):
    """Wait until every grammar is compiled."""
    for _, future in list(masks._waiting.values()):
        assert isinstance(future, Future)
        future.exception(timeout=30)
    return masks.take_compiled()


def attach(masks, sequence_id, grammar, tenant="t"):
    if not masks.admit(submit(sequence_id, grammar, tenant)):
        ready, refused = settle(masks)
        assert [item.sequence_id for item in ready] == [sequence_id]
        assert refused == []


def allowed(masks, sequence_id):
    buffer = np.zeros((1, mask_width(VOCAB)), dtype=np.int32)
    assert masks.fill_mask([sequence_id], buffer) == [0]
    return set(np.flatnonzero(np.unpackbits(buffer.view(np.uint8), bitorder="little")).tolist())


def ids(tokenizer, *texts):
    return {tokenizer[0].token_to_id(text) for text in texts}


def test_mask_holds_every_token_that_may_come_next(masks, tokenizer):
    attach(masks, "a", 'start: "yes" | "no"')
    assert allowed(masks, "a") == ids(tokenizer, "y", "ye", "yes", "n", "no")
    masks.advance("a", tokenizer[0].token_to_id("ye"))
    assert allowed(masks, "a") == ids(tokenizer, "s")


def test_finished_grammar_allows_the_end_and_nothing_else(masks, tokenizer):
    attach(masks, "a", 'start: "yes"')
    masks.advance("a", tokenizer[0].token_to_id("yes"))
    end = tokenizer[0].token_to_id("<|end|>")
    assert allowed(masks, "a") == {end}
    assert masks.allows("a", end)
    assert not masks.allows("a", tokenizer[0].token_to_id("y"))


def test_grammar_that_may_end_or_go_on_allows_both(masks, tokenizer):
    attach(masks, "a", 'start: "n" "o"?')
    masks.advance("a", tokenizer[0].token_to_id("n"))
    assert allowed(masks, "a") == ids(tokenizer, "o", "<|end|>")
    assert all(masks.allows("a", token_id) for token_id in ids(tokenizer, "o", "<|end|>"))


def test_masks_on_several_threads_equal_those_of_one(vocabulary):
    grammars = ['start: "yes" | "no"', "start: /[a-n]+(yes)?/", 'start: "n" "o"?', 'start: "yes" | "no"']
    names = [f"row {index}" for index in range(len(grammars))]
    buffers = []
    for threads in (1, 3):
        made = GrammarMasks(lambda: vocabulary, lambda: None, threads)
        for name, grammar in zip(names, grammars, strict=True):
            attach(made, name, grammar)
        buffer = np.zeros((len(names) + 1, mask_width(VOCAB)), dtype=np.int32)
        assert made.fill_mask([*names, "free"], buffer) == [0, 1, 2, 3]
        buffers.append(buffer)
        made.close()
    assert buffers[0].any(axis=1).all()
    assert (buffers[0] == buffers[1]).all()


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ("start: /[a-n]+(yes)?/", "abcyes"),
        ('start: "yes"', "yes"),
        ('start: "yes" | "no" | "noyes"', "noyes"),
        ('start: "x" "yes"{2,3} /[0-9]+/', "xyesyes12"),
        (
            'start: %json {"type": "object", "properties": {"yes": {"type": "integer"}}, "required": ["yes"]}',
            '{"yes":12,"no":"yes"}',
        ),
    ],
)
def test_allows_agrees_with_the_mask_for_every_token(masks, tokenizer, grammar, text):
    attach(masks, "a", grammar)
    for token_id in [*tokenizer[0].encode(text).ids, None]:
        mask = allowed(masks, "a")
        assert {each for each in range(VOCAB) if masks.allows("a", each)} == mask
        if token_id is not None:
            assert token_id in mask
            masks.advance("a", token_id)


def test_rows_without_a_grammar_allow_everything(masks, tokenizer):
    attach(masks, "a", 'start: "yes"')
    buffer = np.zeros((3, mask_width(VOCAB)), dtype=np.int32)
    assert masks.fill_mask(["free", "a", "other"], buffer) == [1]
    assert (buffer[[0, 2]] == -1).all()
    assert masks.fill_mask(["free"], np.zeros((1, 1), dtype=np.int32)) == []


def test_two_sequences_of_one_grammar_have_places_of_their_own(masks, tokenizer):
    grammar = 'start: "yes" | "no"'
    attach(masks, "a", grammar)
    attach(masks, "b", grammar)
    masks.advance("a", tokenizer[0].token_to_id("ye"))
    assert allowed(masks, "a") == ids(tokenizer, "s")
    assert allowed(masks, "b") == ids(tokenizer, "y", "ye", "yes", "n", "no")


def test_asking_again_changes_nothing(masks):
    attach(masks, "a", 'start: "yes" | "no"')
    assert allowed(masks, "a") == allowed(masks, "a")


def test_grammar_that_does_not_compile_ends_its_sequence_alone(masks):
    assert not masks.admit(submit("bad", "start: nothing"))
    assert not masks.admit(submit("good", 'start: "yes"'))
    assert masks.waiting_count == 2
    ready, refused = settle(masks)
    assert [item.sequence_id for item in ready] == ["good"]
    assert [(event.sequence_id, event.finish_reason, event.error_code) for event in refused] == [
        ("bad", "error", "schema_invalid")
    ]
    assert masks.waiting_count == 0


def test_token_that_the_grammar_refuses_fails_the_sequence(masks, tokenizer):
    attach(masks, "a", 'start: "yes"')
    attach(masks, "b", 'start: "yes"')
    masks.advance("a", tokenizer[0].token_to_id("n"))
    assert [(event.sequence_id, event.error_code) for event in masks.take_failed()] == [("a", "schema_too_complex")]
    assert masks.take_failed() == []
    assert masks.constrained(["a", "b"]) == [1]


def test_grammar_too_complex_for_a_step_fails_the_sequence_and_leaves_its_mask_open(masks, tokenizer):
    attach(masks, "a", 'start: a\na: a a a | b b | "n"\nb: a a | "o"')
    buffer = np.zeros((1, mask_width(VOCAB)), dtype=np.int32)
    for _ in range(400):
        masks.fill_mask(["a"], buffer)
        failed = masks.take_failed()
        if failed:
            break
        masks.advance("a", tokenizer[0].token_to_id("n"))
    assert [event.error_code for event in failed] == ["schema_too_complex"]
    assert (buffer == -1).all()


def test_events_advance_and_end_sequences(masks, tokenizer):
    attach(masks, "a", 'start: "yes"')
    token = DrawnToken(tokenizer[0].token_to_id("ye"))
    masks.observe([SequenceEvent(sequence_id="a", tokens=(token,))])
    assert allowed(masks, "a") == ids(tokenizer, "s")
    masks.observe([SequenceEvent(sequence_id="a", tokens=(token,), finish_reason="length")])
    assert masks.is_idle


def test_forgetting_a_sequence_that_waits_is_told(masks):
    masks.admit(submit("a", 'start: "yes"'))
    assert masks.forget("a")
    assert not masks.forget("a")
    assert masks.waiting_ids() == []


def test_grammar_of_another_tenant_is_compiled_again(masks):
    attach(masks, "a", 'start: "yes"', tenant="one")
    assert masks.admit(submit("b", 'start: "yes"', tenant="one"))
    assert not masks.admit(submit("c", 'start: "yes"', tenant="two"))


@pytest.mark.parametrize(
    ("grammar", "code"),
    [
        pytest.param("start: start", "schema_invalid", id="loop"),
        pytest.param('start: %json {"$ref": "#"}', "schema_invalid", id="reference to itself"),
        pytest.param(
            'start: %json {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}',
            "schema_invalid",
            id="reference loop",
        ),
        pytest.param('start: %json {"$ref": "http://127.0.0.1:1/x.json"}', "schema_invalid", id="remote reference"),
        pytest.param('start: %json {"type": "strin"}', "schema_invalid", id="unknown type"),
        pytest.param('start: %json {"not": {}}', "schema_invalid", id="keyword"),
        pytest.param('start: %json {"type": "string", "format": "zzz"}', "schema_invalid", id="format"),
        pytest.param('start: %json {"allOf": [{"type": "string"}, {"type": "null"}]}', "schema_invalid", id="contradiction"),
        pytest.param("start: /(a/", "schema_invalid", id="pattern"),
        pytest.param(r"start: /(a)\1/", "schema_invalid", id="back-reference"),
        pytest.param("start: /(?=a)b/", "schema_invalid", id="look-around"),
        pytest.param("", "schema_invalid", id="empty"),
        pytest.param("start: " + " | ".join(f'"{i}" x{i}' for i in range(3000)), "schema_invalid", id="unknown rules"),
    ],
)
def test_bad_grammar_is_refused_with_words_of_our_own(vocabulary, grammar, code):
    started_s = time.monotonic()
    with pytest.raises(GrammarError) as caught:
        vocabulary.compile(grammar)
    assert caught.value.error_code == code
    assert "backtrace" not in caught.value.message
    assert len(caught.value.message) < 400
    assert time.monotonic() - started_s < 30


@pytest.mark.parametrize(
    "raw", ["lexer error: too many states: 10 >= 10", "grammar size exceeds limit", "Current row has 3 items; max is 2"]
)
def test_limits_of_the_library_are_too_complex(raw):
    assert explain(raw).error_code == "schema_too_complex"


def test_recursive_schema_is_welcome(vocabulary):
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
    assert not vocabulary.compile(f"start: %json {json.dumps(tree)}").is_error()


def test_explained_text_never_repeats_the_library():
    assert "panic" not in explain("panic: at src/x.rs <backtrace>\n 0: <unknown>").message


def test_cache_drops_a_tenants_oldest_and_then_the_oldest_of_all():
    cache = GrammarCache(node_entries=4, tenant_entries=2)
    for text in ("a", "b", "c"):
        cache.put("one", text, text)
    assert [cache.get("one", text) for text in ("a", "b", "c")] == [None, "b", "c"]
    for tenant in ("two", "three", "four"):
        cache.put(tenant, "a", tenant)
    assert len(cache) == 4
    assert cache.get("one", "b") is None, "the least recently used of all"
    assert cache.get("one", "c") == "c"


def test_cache_stays_bounded_under_ten_thousand_grammars():
    cache = GrammarCache()
    for index in range(10_000):
        cache.put(f"tenant-{index % 40}", str(index), index)
        cache.discard(f"tenant-{index % 7}", str(index - 7))
    assert len(cache) <= 128
    assert sum(cache._counts.values()) == len(cache)
