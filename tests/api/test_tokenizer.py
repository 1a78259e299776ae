"""Where tokens begin in a text, whatever the tokenizer puts before it or cuts in pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from node.api.tokenizer import SpecialTokens, TextTokenizer


@given(text=st.text(alphabet="hello wor\u00e9\u4e16\U0001f600", min_size=1, max_size=30))
def test_places_of_any_text_are_where_its_tokens_begin(tokenizer_dir, text):
    tokenizer = TextTokenizer.open(tokenizer_dir)
    ids = tokenizer.encode(text)
    raw = [tokenizer.token_bytes(token_id) for token_id in ids]
    expected, before = [], b""
    for piece in raw:  # a token in the middle of a character begins behind it
        expected.append(len(before.decode(errors="ignore")) + (0 if _ends_whole(before) else 1))
        before += piece
    assert tokenizer.places(ids, text) == expected


def _ends_whole(raw):
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _sentence_piece():
    """As Llama 2 and Mistral have it: a space before every text, and bos."""
    pieces = ["<unk>", "<s>", "\u2581", "\u2581hi", "\u2581you", "h", "i", "y", "o", "u"]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return TextTokenizer(tokenizer, SpecialTokens(bos_token="<s>", bos_token_id=1, adds_bos=True))


def test_places_leave_out_bos_and_the_space_before_the_text():
    tokenizer = _sentence_piece()
    ids = tokenizer.encode("hi you")
    assert [tokenizer.token_text(token_id) for token_id in ids] == ["<s>", " ", "h", "i", " ", "y", "o", "u"]
    assert tokenizer.places(ids, "hi you") == [0, 0, 0, 1, 2, 3, 4, 5]
    assert tokenizer.places([1, 3, 4], "hi you") == [0, 0, 2]


def test_places_of_control_tokens_in_the_text_count_where_it_shows_them(tokenizer):
    ids = tokenizer.encode("hi<|im_end|>you")
    assert tokenizer.places(ids, "hi<|im_end|>you")[-3:] == [12, 13, 14]
    assert tokenizer.places(ids, tokenizer.decode(ids))[-3:] == [2, 3, 4]


def test_places_never_leave_the_text(tokenizer):
    half = tokenizer.encode("\U0001f600")[:1]
    assert tokenizer.places(half * 5, "\ufffd") == [0, 1, 1, 1, 1]
