"""Streamed text equals text that is decoded at once, and no stop string is emitted, however the text is split."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tp_runtime.errors import RequestError
from tp_runtime.text.detokenize import IncrementalDecoder, StopScanner

CORPUS = ["the cat sat on the mat, 漢字かな交じり文 👩‍👩‍👧 🏳️‍🌈 é e\u0301 שלום\n"] * 9
# Text of the kind that models write, with more of the characters that need several tokens.
TEXT = st.text(
    st.one_of(
        st.sampled_from([*"aeé \n漢字👩🏽\u200d\u0301\ufe0f\ufffd", "𒀀"]),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback(steps: list[object], normalizer: object = None) -> Tokenizer:
    vocab = ["<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁acehmnost,.", "\ufffd"]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def gemma() -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return byte_fallback(steps, normalizers.Replace(" ", "▁"))


def llama() -> Tokenizer:
    """Return a tokenizer like Gemma's that drops the space of the first token."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return byte_fallback(steps, normalizer)


def metaspace() -> Tokenizer:
    steps = [decoders.ByteFallback(), decoders.Metaspace()]
    tokenizer = byte_fallback(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


TOKENIZERS = {make.__name__: make() for make in (byte_level, gemma, llama, metaspace)}


def stream(decode: Callable[[list[int]], str], ids: list[int]) -> list[str]:
    decoder = IncrementalDecoder(decode)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT)
@settings(max_examples=150, deadline=None)
def test_streamed_chunks_join_to_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text).ids
    chunks = stream(tokenizer.decode, ids)
    assert "".join(chunks) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in chunk for chunk in chunks)


@given(ids=st.lists(st.integers(0, TOKENIZERS["byte_level"].get_vocab_size() - 1), max_size=120))
@settings(max_examples=300, deadline=None)
def test_any_ids_stream_as_they_decode_at_byte_level(ids: list[int]) -> None:
    """The ids include malformed bytes, and special tokens in the middle of a character."""
    tokenizer = TOKENIZERS["byte_level"]
    for skip in (True, False):

        def decode(window: list[int], skip: bool = skip) -> str:
            return tokenizer.decode(window, skip_special_tokens=skip)

        assert "".join(stream(decode, ids)) == decode(ids)


@pytest.mark.parametrize("name", ["gemma", "llama", "metaspace"])
@given(ids=st.lists(st.integers(0, TOKENIZERS["gemma"].get_vocab_size() - 1), max_size=120))
@settings(max_examples=200, deadline=None)
def test_any_ids_lose_no_text_with_byte_fallback(name: str, ids: list[int]) -> None:
    """Malformed byte runs may decode differently, but every token that is not a byte is emitted, in order."""
    tokenizer = TOKENIZERS[name]
    text = "".join(stream(tokenizer.decode, ids))
    rest = iter(text)
    assert all(letter in rest for i in ids if (letter := tokenizer.id_to_token(i)) in {*"acehmnost"})
    if "\ufffd" not in tokenizer.decode(ids):
        assert text == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_special_token_keeps_the_space_after_it(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    cat, sat = tokenizer.encode("the cat").ids, tokenizer.encode(" sat").ids
    ids = [0, 0, *cat, *[1] * 40, *sat, 1]
    assert "".join(stream(tokenizer.decode, ids)) == tokenizer.decode(ids)


def test_text_is_emitted_as_soon_as_it_is_certain() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "ð": 1, "Ł": 2, "ĺ": 3, "Ģ": 4}, []))
    tokenizer.decoder = decoders.ByteLevel()
    assert stream(tokenizer.decode, [0, 1, 2, 3, 4, 0, 1]) == [
        "a",
        "",
        "",
        "",
        "\U0001f600",
        "a",
        "",
        "\ufffd",
    ]


def test_a_flushed_decoder_can_be_used_again() -> None:
    tokenizer = TOKENIZERS["llama"]
    ids = tokenizer.encode("cat on").ids
    decoder = IncrementalDecoder(tokenizer.decode)
    for _ in range(2):
        assert "".join(decoder.push(i) for i in ids) + decoder.flush() == "cat on"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", ["the cat sat ", "漢字👩", "\ufffd", "a\x00"])
def test_the_cost_of_decoding_does_not_grow(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return tokenizer.decode(ids)

    stream(decode, tokenizer.encode(text * 200).ids)
    assert longest <= 32


@pytest.mark.parametrize("byte", ["A", "Ä", "ä", "ð", "ÿ"])
def test_the_cost_of_decoding_does_not_grow_with_malformed_bytes(byte: str) -> None:
    """A model that repeats half a character, which is how a bad patch usually degenerates."""
    tokenizer = TOKENIZERS["byte_level"]
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return tokenizer.decode(ids)

    ids = [tokenizer.token_to_id(byte)] * 500
    assert "".join(stream(decode, ids)) == tokenizer.decode(ids)
    assert longest <= 32


def test_the_cost_of_decoding_does_not_grow_if_every_token_ends_inside_a_character() -> None:
    [(word, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("你")
    first, second, third = word
    tokenizer = Tokenizer(models.BPE({first: 0, second: 1, f"{third}b{first}": 2}, []))
    tokenizer.decoder = decoders.ByteLevel()
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return tokenizer.decode(ids)

    assert "".join(stream(decode, [0, *[1, 2] * 200])) == "你b" * 200 + "\ufffd"
    assert longest <= 32


# ---- stop strings


def scan(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    scanner = StopScanner(stops)
    out = ""
    for chunk in chunks:
        safe, stopped = scanner.push(chunk)
        out += safe
        if stopped:
            assert scanner.push("more") == ("", True)
            assert scanner.flush() == ""
            return out, True
    return out + scanner.flush(), False


def cut(text: str, positions: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(p % (len(text) + 1) for p in positions)})
    return [text[a:b] for a, b in pairwise(edges)]


@given(
    text=st.text("abc\n", max_size=40),
    stops=st.lists(st.text("abc\n", min_size=1, max_size=4), max_size=3),
    positions=st.lists(st.integers(0, 40), max_size=10),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_are_found_however_the_text_is_split(text: str, stops: list[str], positions: list[int]) -> None:
    # By definition, the output is the shortest prefix of the text that ends in a stop string, without that string.
    want = text, False
    for end in range(len(text) + 1):
        if ends := [stop for stop in stops if text[:end].endswith(stop)]:
            want = text[: end - max(map(len, ends))], True
            break
    assert scan(stops, cut(text, positions)) == want
    assert scan(stops, list(text)) == want


def test_the_scanner_holds_back_only_text_that_could_start_a_stop_string() -> None:
    scanner = StopScanner(["\nUser:", "END"])
    assert scanner.push("Hello\n") == ("Hello", False)
    assert scanner.push("Us") == ("", False)
    assert scanner.push("ed E") == ("\nUsed ", False)
    assert scanner.flush() == "E"


@pytest.mark.parametrize("stops", [[""], ["a", 3], [None], "text", b"text", None, 5])
def test_a_bad_stop_string_is_refused(stops: list[str]) -> None:
    with pytest.raises(RequestError, match="stop"):
        StopScanner(stops)
