"""The tables of a tokenizer give the ids and texts of the tokenizers library, and damage to their file is refused."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from runtime_tests.folders import without_tables
from tp_runtime.errors import ModelFormatError, RequestError
from tp_runtime.model import PatchedModel
from tp_runtime.session import ModelFolder, describe_files, write_slots_file
from tp_runtime.text import TABLES, TableTokenizer, TextCodec, build_tables, read_tables

_CORPUS = [
    "the theatre there, then these thermal things; 12345 and 1 2 3",
    "Größe naïve façade İstanbul ﬁne e\u0301 漢字とかな 한국어 العربية Кириллица 👩‍👩‍👧 ✊🏽",
    "if (x != y) { return z[0] ** 2; }  // a    b\n\n\tc",
]
_MANY_CHARACTERS = "".join(map(chr, range(0x4E00, 0x4E00 + 1500)))  # more than a byte-level vocabulary has
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_ADDED = [
    AddedToken("<s>", special=True),
    AddedToken("<end>", special=True, lstrip=True, rstrip=True),
    AddedToken("tool", normalized=True, single_word=True),
    AddedToken("\n\n", normalized=False),
    AddedToken("İx", normalized=True),
]


def _trained(model: models.BPE, alphabet: str = "", special: tuple[str, ...] = (), **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    initial = pre_tokenizers.ByteLevel.alphabet() if alphabet == "bytes" else sorted(set(alphabet))
    size = 400 + len(initial) + len(special)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=initial, show_progress=False
    )
    tokenizer.train_from_iterator([*_CORPUS, alphabet] if len(alphabet) > 5 else _CORPUS, trainer)
    # With an added token that the normaliser changes there would be no tables.
    change = tokenizer.normalizer.normalize_str if tokenizer.normalizer is not None else str
    tokenizer.add_tokens(
        [token for token in _ADDED[2:] if not token.normalized or change(token.content) == token.content]
    )
    tokenizer.add_special_tokens(_ADDED[:2])
    return tokenizer


def _byte_level(**model: Any) -> Tokenizer:
    return _trained(
        models.BPE(**model),
        "bytes",
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        decoder=decoders.ByteLevel(),
        normalizer=normalizers.NFC(),
    )


def _whole_words() -> Tokenizer:
    """With a word in the vocabulary that no merge makes, and every added token in the vocabulary."""
    content = json.loads(_byte_level().to_str())
    vocab = content["model"]["vocab"]
    content["model"]["ignore_merges"] = True
    for word in ("Ġthings", "zq", *(token.content for token in _ADDED)):
        vocab.setdefault(word, len(vocab))
    for token in content["added_tokens"]:
        token["id"] = vocab[token["content"]]
    return Tokenizer.from_str(json.dumps(content))


def _sentence_pieces(alphabet: str = "", **model: Any) -> Tokenizer:
    tokenizer = _trained(
        models.BPE(unk_token="<unk>", **model),
        alphabet + "▁",
        ("<unk>", *(_BYTES if model.get("byte_fallback") else ())),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <end>", special_tokens=[("<s>", start), ("<end>", tokenizer.token_to_id("<end>"))]
    )
    return tokenizer


def _lower_case() -> Tokenizer:
    return _trained(
        models.BPE(unk_token="[UNK]"),
        _MANY_CHARACTERS,
        ("[UNK]",),
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": _byte_level,
    "byte-level, whole words": _whole_words,
    "pieces, bytes": lambda: _sentence_pieces(byte_fallback=True, fuse_unk=True),
    "pieces, bytes, many characters": lambda: _sentence_pieces(_MANY_CHARACTERS, byte_fallback=True),
    "pieces, unknown": lambda: _sentence_pieces(fuse_unk=True),
    "pieces, unknown, many characters": lambda: _sentence_pieces(_MANY_CHARACTERS),
    "lower case": _lower_case,
}
_FRAGMENTS = st.sampled_from(
    [*_CORPUS, *(token.content for token in _ADDED), *"abehtsn123 .,\n\t▁Ġ", " the", "  ", "Tool", _MANY_CHARACTERS[:9]]
)
_TEXTS = st.lists(st.text(max_size=12) | _FRAGMENTS, max_size=8).map("".join)


def _pair(name: str) -> tuple[TableTokenizer, Tokenizer]:
    library = TOKENIZERS[name]()
    content = library.to_str().encode()
    library = Tokenizer.from_buffer(content)
    raw = build_tables(content)
    assert raw is not None
    tables = read_tables(raw, hashlib.sha256(content).hexdigest(), "tables")
    return TableTokenizer(tables, lambda: library, budget=math.inf), library


@pytest.fixture(scope="module", params=TOKENIZERS)
def pair(request: pytest.FixtureRequest) -> tuple[TableTokenizer, Tokenizer]:
    return _pair(request.param)


@settings(max_examples=60, deadline=None)
@given(text=_TEXTS, special=st.booleans(), skip=st.booleans())
def test_ids_and_texts_are_those_of_the_library(
    pair: tuple[TableTokenizer, Tokenizer], text: str, special: bool, skip: bool
) -> None:
    tables, library = pair
    got, wanted = (each.encode(text, add_special_tokens=special) for each in pair)
    assert (got.ids, got.special_tokens_mask) == (wanted.ids, wanted.special_tokens_mask)
    assert tables.decode(got.ids, skip) == library.decode(wanted.ids, skip_special_tokens=skip)


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, 2200), max_size=30), skip=st.booleans())
def test_any_ids_give_the_library_s_text(pair: tuple[TableTokenizer, Tokenizer], ids: list[int], skip: bool) -> None:
    tables, library = pair
    assert tables.decode(ids, skip) == library.decode(ids, skip_special_tokens=skip)


def test_tokens_are_found_by_their_texts(pair: tuple[TableTokenizer, Tokenizer]) -> None:
    tables, library = pair
    for token, index in library.get_vocab(with_added_tokens=True).items():
        assert tables.token_to_id(token) == index
    assert tables.token_to_id("no such token") is None
    assert {index: token.special for index, token in tables.get_added_tokens_decoder().items()} == {
        index: token.special for index, token in library.get_added_tokens_decoder().items()
    }


def test_the_library_is_loaded_for_many_characters_and_for_grammars() -> None:
    tables, library = _pair("byte-level")
    loads = []
    limited = TableTokenizer(tables._tables, lambda: loads.append(1) or library, budget=30)  # type: ignore[func-returns-value]
    assert limited.encode("the theatre").ids == library.encode("the theatre").ids
    assert loads == []
    assert limited.encode("the theatre there, the thing").ids == library.encode("the theatre there, the thing").ids
    assert limited.get_vocab() == library.get_vocab()
    assert limited.to_str() == library.to_str()
    assert loads == [1]


def _unlike(**model: Any) -> bytes:
    content = json.loads(_byte_level().to_str())
    content["model"] |= model
    return json.dumps(content).encode()


def _plain(vocab: dict[str, int], added: Sequence[AddedToken] = (), **model: Any) -> bytes:
    """A tokenizer without merges, in lower case."""
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="?", **model))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens(list(added))
    return tokenizer.to_str().encode()


OTHERS = {
    "unigram": lambda: Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], 0, False)).to_str().encode(),
    "word pieces": lambda: Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).to_str().encode(),
    "random merges": lambda: _unlike(dropout=0.1),
    "ends of words": lambda: _unlike(end_of_word_suffix="</w>"),
    "two texts of one id": lambda: _unlike(vocab={"a": 0, "b": 0, "ab": 1}, merges=[]),
    "an added token that is normalised": lambda: _plain({"t": 0, "?": 1}, [AddedToken("TOOL")]),
    "added tokens apart, whole words": lambda: _unlike(ignore_merges=True),
    "a whole word of characters that are no tokens": lambda: _plain({"a": 0, "€€": 1, "?": 2}, ignore_merges=True),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_tokenizers_get_no_tables(other: str) -> None:
    assert build_tables(OTHERS[other]()) is None


@pytest.fixture(scope="module")
def file() -> tuple[bytes, str]:
    content = TOKENIZERS["pieces, bytes, many characters"]().to_str().encode()
    raw = build_tables(content)
    assert raw is not None
    return raw, hashlib.sha256(content).hexdigest()


def test_tables_of_another_tokenizer_are_refused(file: tuple[bytes, str]) -> None:
    with pytest.raises(ModelFormatError, match="tokenizer is another one"):
        read_tables(file[0], "0" * 64, "tables")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_gives_ids(file: tuple[bytes, str], data: st.DataObject) -> None:
    """A change that contradicts nothing cannot be seen here: the folder's digest finds it. But nothing goes astray."""
    raw, digest = bytearray(file[0]), file[1]
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of the changes are in the header, which is small.
        top = data.draw(st.sampled_from([len(raw) - 1, 12_000]))
        raw[data.draw(st.integers(0, top))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(raw), len(raw), data.draw(st.integers(0, len(raw)))]))
    try:
        tables = read_tables(bytes(raw[:cut]), digest, "tables")
        tokenizer = TableTokenizer(tables, lambda: pytest.fail("loaded"), budget=math.inf)
        assert all(
            0 <= index < len(tables.ends) for index in tokenizer.encode("the theatre <s> 漢字 \u4e00\u4e01 x").ids
        )
        tokenizer.decode(list(range(0, len(tables.ends), 7)))
    except ModelFormatError:
        pass
    except Exception as error:  # what the tokenizers library says of settings that are none; the codec translates it
        assert type(error).__module__ == "builtins" and type(error) in (Exception, TypeError, ValueError), error


# -- in a folder ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_llama_export: Path, tmp_path: Path) -> Path:
    """A copy of a folder with tables."""
    return Path(shutil.copytree(tiny_llama_export, tmp_path / "model"))


@pytest.fixture
def earlier(tiny_llama_export: Path, tmp_path: Path) -> Path:
    """The same folder as an earlier version exported it: without tables."""
    return without_tables(Path(shutil.copytree(tiny_llama_export, tmp_path / "earlier")))


def _with_tables(path: Path, raw: bytes) -> Path:
    opened = ModelFolder.open(path)
    (path / TABLES).write_bytes(raw)
    write_slots_file(replace(opened, files=describe_files(path, sorted({*opened.files, TABLES}))))
    return path


def test_a_folder_s_tables_are_read_in_place_of_its_tokenizer(folder: Path, earlier: Path) -> None:
    plain = TextCodec.from_model_folder(ModelFolder.open(earlier))
    opened = ModelFolder.open(folder)
    (folder / "tokenizer.json").unlink()
    codec = TextCodec.from_model_folder(opened)
    for prompt in ("hello", "the theatre <|im_end|> Größe\n"):
        assert codec.render(prompt) == plain.render(prompt)
        assert codec.render(prompt, "a system message") == plain.render(prompt, "a system message")
        assert codec.render(prompt, raw=True) == plain.render(prompt, raw=True)
    ids = list(range(opened.vocab_size))
    assert codec.decode(ids) == plain.decode(ids)
    assert codec.decode(ids, keep_markers=True) == plain.decode(ids, keep_markers=True)
    assert (codec.eos_ids, codec.bos_id) == (plain.eos_ids, plain.bos_id)
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        codec.render("long " * 2**14)


def test_the_tokenizer_can_be_loaded_ahead(folder: Path) -> None:
    opened = ModelFolder.open(folder)
    codec = TextCodec.from_model_folder(opened)
    before = codec.render("hello")
    codec.load_tokenizer()
    (folder / "tokenizer.json").unlink()
    assert codec.render("hello") == before
    codec.render("long " * 2**14)
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        TextCodec.from_model_folder(opened).load_tokenizer()


@pytest.mark.parametrize("ids", [[-1], [2**40], ["a"], [1.5]])
def test_bad_ids_are_refused_as_without_tables(folder: Path, ids: list[Any]) -> None:
    with pytest.raises(RequestError, match="not a list of token ids"):
        TextCodec.from_model_folder(ModelFolder.open(folder)).decode(ids)


def test_a_model_with_tables_gives_the_same_text(folder: Path, earlier: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": 5}
    texts = [PatchedModel.from_pretrained(path, "cpu").generate("hello", **options) for path in (folder, earlier)]
    assert texts[0] == texts[1]


def test_damaged_tables_are_refused_when_the_folder_is_opened(folder: Path) -> None:
    content = bytearray((folder / TABLES).read_bytes())
    content[-1] ^= 1
    (folder / TABLES).write_bytes(content)
    with pytest.raises(ModelFormatError, match=TABLES):
        ModelFolder.open(folder)


@pytest.mark.parametrize("content", [b"", b"{}", bytes(100)])
def test_listed_tables_that_are_none_are_refused(folder: Path, content: bytes) -> None:
    _with_tables(folder, content)
    with pytest.raises(ModelFormatError, match=TABLES):
        PatchedModel.from_pretrained(folder, "cpu")
