"""Tokenizers built from GGUF metadata against transformers' own, and against what llama.cpp's pre-tokenizer names promise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.models.llama.tokenization_llama import LlamaTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from node.errors import ModelLoadError
from node.models.gguf_file import GgufFile
from node.models.gguf_tokenizer import gguf_tokenizer
from node.models.source import PACKAGED_MODEL, resolve

TRICKY = [
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "tabs\tand\nnewlines\r\n\n\n  indented",
    "don't we'll I'M they'Ve",
    "naïve café ÆØÅ ß ﬁ",
    "日本語のテキスト 中文 한국어",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 👍🏽 end",
    "zero\u200bwidth\u00a0nbsp\ufeffbom",
    "e\u0301 combining a\u0308\u0323",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "not a <|im_start token|>",
    "x=1;y=22;z=333 4444 55555",
    "\x00\x01\x7f control",
    "العربية עברית हिन्दी ไทย",
    "a" * 300,
    "\ud7ff\ue000\U0010ffff",
    "<|endoftext|><|endoftext|>",
]


@pytest.fixture(scope="module")
def smollm2():
    return gguf_tokenizer(GgufFile(resolve(PACKAGED_MODEL).weights[0]))


@pytest.fixture(scope="module")
def reference():
    files = resolve(PACKAGED_MODEL)
    return AutoTokenizer.from_pretrained(str(files.directory), gguf_file=files.weights[0].name)


def fake_file(**metadata):
    """Metadata as `GgufFile` holds it; `pre` stands for tokenizer.ggml.pre."""
    return SimpleNamespace(path=Path("tiny.gguf"), metadata={f"tokenizer.ggml.{key}": value for key, value in metadata.items()})


@pytest.mark.parametrize("text", TRICKY)
def test_smollm2_encodes_as_transformers(text, smollm2, reference):
    assert smollm2.encode(text).ids == reference(text)["input_ids"]


@pytest.mark.parametrize("text", [*TRICKY, "    4 spaces, 2  words and 12  numbers", " ½ ٣"])
def test_smollm2_decodes_to_the_same_text(text, smollm2):
    ids = smollm2.encode(text).ids

    assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_smollm2_splits_digits_before_words_as_it_was_trained(smollm2):
    """transformers leaves this rule of the pre-tokenizer "smollm" out, which shows where spaces meet a number."""
    assert smollm2.encode("  12").tokens == ["ĠĠ", "1", "2"]
    assert smollm2.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]


def test_smollm2_survives_being_saved(smollm2):
    copy = Tokenizer.from_str(smollm2.to_str())

    assert [copy.encode(text).ids for text in TRICKY] == [smollm2.encode(text).ids for text in TRICKY]


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = [
    "▁",
    "e",
    "t",
    "h",
    "l",
    "o",
    "w",
    "r",
    "d",
    "he",
    "ll",
    "hell",
    "hello",
    "▁hello",
    "▁w",
    "or",
    "ld",
    "▁wor",
    "▁world",
    "▁▁",
]


@pytest.fixture(scope="module")
def sentencepiece():
    tokens = PIECES + WORDS
    scores = [0.0] * len(PIECES) + [-float(len(WORDS) - i) for i in range(len(WORDS))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(WORDS)
    return fake_file(
        model="llama",
        tokens=tokens,
        scores=scores,
        token_type=kinds,
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )


@pytest.mark.parametrize("text", ["hello world", "hello  world hello", "held", "x é 日", "hello\n\tworld"])
def test_sentencepiece_encodes_as_transformers(text, sentencepiece):
    from transformers.tokenization_utils_base import generate_merges

    tokens = sentencepiece.metadata["tokenizer.ggml.tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    scores = dict(zip(tokens, sentencepiece.metadata["tokenizer.ggml.scores"], strict=True))
    theirs = LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores))

    ours = gguf_tokenizer(sentencepiece)

    assert ours.encode(text).ids == [1, *theirs(text, add_special_tokens=False)["input_ids"]]


def test_sentencepiece_prefixes_every_piece_of_text_with_a_space(sentencepiece):
    """As sentencepiece and llama.cpp do; transformers 5 does not before a space or after a special token."""
    tokenizer = gguf_tokenizer(sentencepiece)

    assert tokenizer.encode(" hello", add_special_tokens=False).tokens == ["▁▁", "hello"]
    assert tokenizer.encode("<s>hello</s>", add_special_tokens=False).tokens == ["<s>", "▁hello", "</s>"]


def test_sentencepiece_round_trip_and_bos(sentencepiece):
    tokenizer = gguf_tokenizer(sentencepiece)

    assert tokenizer.encode("hello world").tokens == ["<s>", "▁hello", "▁world"]
    assert tokenizer.encode("hello world", add_special_tokens=False).tokens == ["▁hello", "▁world"]
    assert tokenizer.decode(tokenizer.encode("hello é\n日").ids) == "hello é\n日"


def test_sentencepiece_without_bos_flag_set_adds_none(sentencepiece):
    sentencepiece.metadata["tokenizer.ggml.add_bos_token"] = False
    try:
        assert gguf_tokenizer(sentencepiece).encode("hello").tokens == ["▁hello"]
    finally:
        del sentencepiece.metadata["tokenizer.ggml.add_bos_token"]


def byte_level(pre):
    """A byte-level vocabulary without merges: every token is one byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    return fake_file(model="gpt2", pre=pre, tokens=sorted(ByteLevel.alphabet()), merges=[])


@pytest.mark.parametrize("text", TRICKY)
def test_qwen2_cuts_text_as_transformers(text):
    file = byte_level("qwen2")
    vocab = {token: index for index, token in enumerate(file.metadata["tokenizer.ggml.tokens"])}
    theirs = Qwen2Tokenizer(vocab={**vocab, "<|endoftext|>": len(vocab)}, merges=[]).backend_tokenizer

    ours = gguf_tokenizer(file)

    normal = theirs.normalizer.normalize_str(text)
    assert ours.normalizer.normalize_str(text) == normal
    assert ours.pre_tokenizer.pre_tokenize_str(normal) == theirs.pre_tokenizer.pre_tokenize_str(normal)


def test_llama3_groups_up_to_three_digits():
    cut = gguf_tokenizer(byte_level("llama-bpe")).pre_tokenizer.pre_tokenize_str("a 12345\n\nb")

    assert [piece for piece, _ in cut] == ["a", "Ġ", "123", "45", "ĊĊ", "b"]


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"model": "bert", "tokens": ["a"]}, "bert"),
        ({"model": "gpt2", "pre": "unheard-of", "tokens": ["a"], "merges": []}, "unheard-of"),
        ({"model": "gpt2", "pre": None, "tokens": ["a"], "merges": []}, "None"),
        ({"model": "gpt2"}, "no vocabulary"),
        ({"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "a"]}, "twice"),
        ({"model": "gpt2", "pre": "gpt-2", "tokens": ["a"], "merges": ["a b"]}, "merges"),
        ({"model": "llama", "tokens": ["a"]}, "scores"),
    ],
)
def test_unusable_vocabulary_is_refused_by_name(metadata, named):
    with pytest.raises(ModelLoadError) as caught:
        gguf_tokenizer(fake_file(**metadata))

    assert named in caught.value.message
