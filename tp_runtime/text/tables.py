"""The tables of a tokenizer: the content of tokenizer.json in a form that needs no parsing.

The tokenizers library reads a whole tokenizer.json before it can encode a word, which takes seconds where there are
hundreds of thousands of merges. A prompt needs a few hundred of them. So an export also holds them as arrays that are
searched in place (table_tokenizer.py), in one safetensors file:

    text     U8   the texts of all tokens, one behind the other, in the order of their ids
    ends     U32  where the text of each id ends; an id without text does not exist
    order    U32  the ids in the order of their texts, so that a text can be found
    pairs    U64  the merges as (left id << 32) + right id, ascending
    ranks    U32  the place of each of these merges in tokenizer.json
    results  U32  the id that each of them makes

What is small stays as it is in tokenizer.json, and is in the metadata: added tokens, the normaliser, the pre-tokenizer,
the post-processor and the decoder. They are the library's own work as before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..errors import ModelFormatError
from ..storage import (
    REEXPORT,
    SafetensorsError,
    StrictJSONError,
    parse_json_object,
    parse_safetensors,
    safetensors_header,
)

_FORMAT, _VERSION = "tp-tokenizer-tables", "1"
_KEPT = ("normalizer", "pre_tokenizer", "post_processor", "decoder")  # of tokenizer.json
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
_MOST_SYMBOLS = 1024  # a byte-level tokenizer has 256 single characters
_ARRAYS = {"text": "U8", "ends": "U32", "order": "U32", "pairs": "U64", "ranks": "U32", "results": "U32"}
_DTYPES = {"U8": "<u1", "U32": "<u4", "U64": "<u8"}
_BYTES = {name: np.dtype(dtype).itemsize for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Added:
    """An added token, which is found in a text before anything else.

    Attributes:
        id: its id.
        content: its text.
        flags: its other settings in tokenizer.json, such as `special`.
    """

    id: int
    content: str
    flags: Mapping[str, bool]

    @property
    def special(self) -> bool:
        """Whether a decoder may leave it out."""
        return self.flags["special"]


@dataclass(frozen=True)
class Tables:
    """The tables of one tokenizer, as they are in the file.

    Attributes:
        text, ends, order, pairs, ranks, results: see the module.
        settings: the parts of tokenizer.json that are kept as they are, and `model`, the model without its tokens.
        added: the added tokens.
        symbols: the ids that texts are split into, of which merges make all others: single characters, bytes and the
            unknown token. All of them, or, if `sparse`, only those that stand for what is no token.
        sparse: whether there are other single characters, too many to list.
    """

    text: bytes
    ends: memoryview
    order: memoryview
    pairs: memoryview
    ranks: memoryview
    results: memoryview
    settings: Mapping[str, Any]
    added: tuple[Added, ...]
    symbols: tuple[int, ...]
    sparse: bool


def build_tables(tokenizer: bytes) -> bytes | None:
    """Return the file with the tables of a tokenizer.json that the tokenizers library accepts.

    Returns:
        The file; None if the tables could not give the same ids, because the tokenizer is not plain BPE.
    """
    content = parse_json_object(tokenizer, lenient=True)
    model, tokens = content["model"], content.get("added_tokens") or []
    if model.get("type") != "BPE" or any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        return None
    vocab: dict[str, int] = model["vocab"]
    texts = {index: token for token, index in vocab.items()}
    apart = [token for token in tokens if token["content"] not in vocab]
    every = texts | {token["id"]: token["content"] for token in apart}
    settled = all(every.get(token["id"]) == token["content"] for token in tokens)
    if len(every) != len(vocab) + len(apart) or not settled or "" in every.values():
        return None
    # An added token that is no token of the model must not be found as a character or, with ignore_merges, as a word.
    if any(len(token["content"]) == 1 for token in apart) or (apart and model.get("ignore_merges")):
        return None
    # Releases of the library differ in the text of an added token that the normaliser changes.
    normalizer = Tokenizer.from_buffer(tokenizer).normalizer
    if normalizer is not None and any(
        token.get("normalized") and normalizer.normalize_str(token["content"]) != token["content"] for token in tokens
    ):
        return None
    found = _symbols(vocab, model)
    if found is None or (model.get("ignore_merges") and (found[1] or not _are_spelt(vocab, tokens))):
        return None
    merges = _merges(model["merges"], vocab)
    if merges is None:
        return None
    pieces = [every.get(index, "").encode() for index in range(max(every) + 1)]
    arrays: dict[str, NDArray[Any]] = {
        "text": np.frombuffer(b"".join(pieces), np.uint8),
        "ends": np.cumsum([len(piece) for piece in pieces], dtype=np.uint32),
        "order": np.array(sorted(every, key=lambda index: pieces[index]), np.uint32),
        **merges,
    }
    settings = {key: content.get(key) for key in _KEPT}
    settings["model"] = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "tokenizer": hashlib.sha256(tokenizer).hexdigest(),
        "settings": json.dumps(settings, ensure_ascii=False),
        "added": json.dumps(_grouped(tokens), ensure_ascii=False),
        "symbols": json.dumps({"ids": found[0], "sparse": found[1]}),
    }
    described = {name: (dtype, arrays[name].shape, _BYTES[dtype]) for name, dtype in _ARRAYS.items()}
    header, order, _ = safetensors_header(metadata, described)
    blobs = [arrays[name].astype(_DTYPES[_ARRAYS[name]]).tobytes() for name in order]
    return b"".join([len(header).to_bytes(8, "little"), header, *blobs])


def _symbols(vocab: Mapping[str, int], model: Mapping[str, Any]) -> tuple[list[int], bool] | None:
    """Return the ids of `Tables.symbols`, and whether they are sparse; None if a missing character would not show."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if model.get("byte_fallback") else []
    unknown = [model["unk_token"]] if model.get("unk_token") is not None else []
    if not all(token in vocab for token in unknown):
        return None
    special = {vocab[token] for token in (*fallback, *unknown) if token in vocab}
    single = {index for token, index in vocab.items() if len(token) == 1}
    if len(single) <= _MOST_SYMBOLS:
        return sorted(special | single), False
    if not unknown and not (fallback and all(token in vocab for token in fallback)):
        return None
    return sorted(special), True


def _are_spelt(vocab: Mapping[str, int], tokens: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether every character of every token is a token, so that a whole word is known by its symbols.

    An added token is found before the text becomes words, unless it has to be a word of its own.
    """
    found_before = {token["content"] for token in tokens if not token.get("single_word")}
    return all(character in vocab for token in vocab.keys() - found_before for character in token)


def _merges(merges: Iterable[Any], vocab: Mapping[str, int]) -> dict[str, NDArray[Any]] | None:
    """Return the three arrays of merges; None if the library would read them in a way of its own."""
    found: dict[int, tuple[int, int]] = {}
    for rank, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2 or (isinstance(merge, str) and merge.startswith("#version")):
            return None
        left, right = parts
        if left not in vocab or right not in vocab or left + right not in vocab:
            return None
        found[(vocab[left] << 32) + vocab[right]] = rank, vocab[left + right]  # of two equal merges the last one counts
    pairs = sorted(found)
    values = np.array([found[pair] for pair in pairs], np.uint32).reshape(-1, 2)
    return {"pairs": np.array(pairs, np.uint64), "ranks": values[:, 0], "results": values[:, 1]}


def _grouped(tokens: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """Return added tokens in their order, as runs [flags, ids, contents]: thousands of them have the same flags.

    Where two of them are found in the same text, because the normaliser makes them equal, the first one counts.
    """
    runs: list[list[Any]] = []
    for token in tokens:
        flags = [bool(token.get(name)) for name in _FLAGS]
        if not runs or runs[-1][0] != flags:
            runs.append([flags, [], []])
        runs[-1][1].append(token["id"])
        runs[-1][2].append(token["content"])
    return runs


# -- reading -------------------------------------------------------------------------------------------------


def read_tables(raw: bytes, tokenizer_sha256: str, field: str) -> Tables:
    """Check the file of tables and return its content.

    Args:
        raw: the bytes of the file.
        tokenizer_sha256: the digest of the folder's tokenizer.json.
        field: the file, for errors.

    Raises:
        ModelFormatError: the file is damaged, or was made of another tokenizer.json.
    """
    try:
        metadata, ranges = parse_safetensors(raw, _BYTES)
        _require(isinstance(metadata, dict), "its metadata is missing")
        for key, wanted in {"format": _FORMAT, "version": _VERSION, "tokenizer": tokenizer_sha256}.items():
            _require(metadata.get(key) == wanted, f"its {key} is another one")
        kinds = {name: stored.dtype for name, stored in ranges.items()}
        _require(kinds == _ARRAYS, "its arrays are not those of a tokenizer")
        arrays = {
            name: np.frombuffer(raw[stored.begin : stored.end], _DTYPES[stored.dtype])
            for name, stored in ranges.items()
        }
        _check_arrays(arrays)
        text = arrays["text"].tobytes()
        text.decode("utf-8")
        views = {name: array.data for name, array in arrays.items() if name != "text"}
        settings, added, symbols = (_parsed(metadata, key) for key in ("settings", "added", "symbols"))
        tokens = tuple(
            Added(index, content, dict(zip(_FLAGS, flags, strict=True)))
            for flags, ids, contents in added
            for index, content in zip(ids, contents, strict=True)
        )
        size, listed = len(arrays["ends"]), (*symbols["ids"], *(token.id for token in tokens))
        _require(all(type(index) is int and 0 <= index < size for index in listed), "it names ids that do not exist")
        _require(all(isinstance(token.content, str) and token.content for token in tokens), "an added token is no text")
        _require(isinstance(settings["model"], dict), "it holds no model")
        return Tables(
            text,
            **views,
            settings=settings,
            added=tokens,
            symbols=tuple(symbols["ids"]),
            sparse=bool(symbols["sparse"]),
        )
    except (SafetensorsError, StrictJSONError, _Damaged, ValueError, TypeError, KeyError) as error:
        raise ModelFormatError(
            "the tables of the tokenizer are damaged", field=field, got=error, wanted="the exported file", fix=REEXPORT
        ) from error


class _Damaged(Exception):
    """The content contradicts itself or tokenizer.json."""


def _check_arrays(arrays: Mapping[str, NDArray[Any]]) -> None:
    text, ends, order, pairs = (arrays[name] for name in ("text", "ends", "order", "pairs"))
    _require(all(array.ndim == 1 for array in arrays.values()), "an array has more than one dimension")
    _require(ends.size > 0 and int(ends[-1]) == text.size, "its tokens do not fill their text")
    _require(bool(np.all(ends[1:] >= ends[:-1])), "its tokens overlap")
    starts = ends[:-1][ends[:-1] < text.size]
    _require(not np.any((text[starts] & 0xC0) == 0x80), "a token begins within a character")
    _require(bool(np.all(order < ends.size)), "its order names other ids")
    _require(np.bincount(order, minlength=1).max() <= 1, "its order names an id twice")
    _require(pairs.size == arrays["ranks"].size == arrays["results"].size, "its merges are incomplete")
    _require(bool(np.all(pairs[1:] > pairs[:-1])), "its merges are not in order")
    _require(bool(np.all(arrays["results"] < ends.size)), "its merges make ids that do not exist")


def _parsed(metadata: Mapping[str, Any], key: str) -> Any:
    return parse_json_object('{"value": ' + str(metadata[key]) + "}")["value"]


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise _Damaged(problem)
