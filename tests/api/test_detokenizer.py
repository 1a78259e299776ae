"""Pieces of text concatenate to the whole, characters never come in halves, garbage never grows the window."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from node.api.detokenizer import IncrementalDetokenizer
from node.api.tokenizer import TextTokenizer


def run(decode, ids):
    detokenizer = IncrementalDetokenizer(decode)
    pieces = [detokenizer.feed(token_id) for token_id in ids]
    return pieces, detokenizer.finish()


@given(text=st.text(max_size=60))
def test_pieces_of_any_text_concatenate_to_it(tokenizer_dir, text):
    tokenizer = TextTokenizer.open(tokenizer_dir)
    ids = tokenizer.encode(text)
    pieces, rest = run(tokenizer.decode, ids)
    assert "".join(pieces) + rest == text


@given(text=st.text(alphabet="a\u00e9\u4e16\U0001f600", max_size=30))
def test_no_piece_shows_half_a_character(tokenizer_dir, text):
    tokenizer = TextTokenizer.open(tokenizer_dir)
    pieces, rest = run(tokenizer.decode, tokenizer.encode(text))
    assert "\ufffd" not in "".join(pieces) + rest


def test_character_of_four_tokens_comes_with_its_last(tokenizer):
    ids = tokenizer.encode("\U0001f600")
    pieces, rest = run(tokenizer.decode, ids)
    assert len(ids) == 4
    assert pieces == ["", "", "", "\U0001f600"]
    assert rest == ""


def test_bytes_that_never_become_a_character_are_marked_at_the_end(tokenizer):
    half = tokenizer.encode("\U0001f600")[:2]
    pieces, rest = run(tokenizer.decode, [*tokenizer.encode("a"), *half])
    assert "".join(pieces) == "a"
    assert set(rest) == {"\ufffd"}


def test_endless_garbage_is_given_out_and_text_after_it_is_whole(tokenizer):
    continuation = tokenizer.encode("\U0001f600")[1]
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return tokenizer.decode(ids)

    pieces, _ = run(decode, [continuation] * 500 + tokenizer.encode("hello"))
    assert longest <= 64
    assert "".join(pieces).endswith("hello")


@given(st.lists(st.integers(0, 262), max_size=60))
def test_any_ids_lose_no_readable_character(tokenizer_dir, ids):
    tokenizer = TextTokenizer.open(tokenizer_dir)
    pieces, rest = run(tokenizer.decode, ids)
    whole = tokenizer.decode(ids)
    assert ("".join(pieces) + rest).replace("\ufffd", "").startswith(whole.replace("\ufffd", "")[:1])


def sentencepiece() -> Tokenizer:
    """A Llama-like tokenizer: spaces as U+2581, bytes as <0xNN>, the first space of a text stripped."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u2581", "a")], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


@given(st.text(alphabet="ab \u00e9\U0001f600", max_size=40))
def test_pieces_of_a_sentencepiece_tokenizer_keep_every_space(text):
    tokenizer = sentencepiece()
    ids = tokenizer.encode(text).ids
    pieces, rest = run(tokenizer.decode, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids) == text


def test_run_of_bytes_cut_off_marks_only_the_last_character():
    tokenizer = sentencepiece()
    ids = tokenizer.encode("\U0001f600\u00e9").ids[:-1]
    pieces, rest = run(tokenizer.decode, ids)
    assert "".join(pieces) + rest == "\U0001f600\ufffd"


def test_special_tokens_leave_no_text(tokenizer):
    ids = [*tokenizer.encode("a"), tokenizer.special.eos_token_id, *tokenizer.encode("b")]
    pieces, rest = run(tokenizer.decode, ids)
    assert "".join(pieces) + rest == "ab"
