"""Rebuilds the published files of a sentencepiece BPE tokenizer from the tokens and scores in a GGUF file.

sentencepiece stores no merges: it merges the two neighbours that form the token with the best score. tokenizer.json
lists merges, so the publisher's conversion to it lists every split of a token into two tokens of the vocabulary. The
order of the list decides the token ids: the best score first, then the longest left part, then the longest right part,
then the lowest id.

llama.cpp writes two things otherwise than tokenizer.json. User-defined tokens contain plain spaces instead of the
metaspace, and have a score of -1000 instead of 0. What a GGUF file does not hold is in the manifest, with the digests
of the published files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from tp_runtime.errors import ModelFormatError, shortened

from .gguf_metadata import read_metadata
from .manifest import SentencePiece

_METASPACE = "\u2581"
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_KEY = "tokenizer.ggml."


def rebuild_tokenizer(gguf: Path, rules: SentencePiece, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. The caller checks their digests.

    Args:
        gguf: the path of the GGUF file.
        rules: the part of the manifest that states what the GGUF file does not hold.
        folder: the folder to write to.

    Raises:
        ModelFormatError: the GGUF file is damaged or holds no sentencepiece tokenizer, or the manifest names a special
            token that is not an added one.
        OSError: the disk is full.
    """
    tokens, scores, types, unknown = _vocabulary(gguf)
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise ModelFormatError(
            "the vocabulary holds a token twice",
            field=f"{gguf.name} {_KEY}tokens",
            got=f"{len(ids)} different tokens",
            wanted=len(tokens),
        )
    added = _added_tokens(tokens, types, rules)
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": tokens[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": ids,
        "merges": merges(ids, scores),
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, **token} for index, token in added.items()],
        **rules.tokenizer.fields,
        "model": model,
    }
    decoder = {str(index): dict(sorted(token.items())) for index, token in added.items()}
    config = {**rules.config.fields, "added_tokens_decoder": decoder}
    (folder / rules.tokenizer.name).write_bytes(_json(tokenizer))
    (folder / rules.config.name).write_bytes(_json(dict(sorted(config.items()))) + b"\n")


def merges(ids: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return the merges of a sentencepiece BPE in the order in which tokenizer.json lists them.

    The work is two look-ups in the vocabulary for each place at which a token can be split.

    Args:
        ids: the id of each token, in the order of the ids.
        scores: the score of each token, in the same order.

    Returns:
        The left and the right part of each merge, the first merge first.
    """
    found = []
    for token, score in zip(ids, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((score, cut, len(right), left, right))
    # The sort is stable also in reverse, so equal merges stay in the order of their tokens' ids.
    found.sort(key=itemgetter(0, 1, 2), reverse=True)
    return [(left, right) for _score, _left, _right, left, right in found]


def _vocabulary(gguf: Path) -> tuple[list[str], list[float], list[int], int]:
    """Return the tokens and scores as tokenizer.json has them, the types, and the id of the unknown token."""
    metadata = read_metadata(gguf)
    model = metadata.get(f"{_KEY}model")
    if model != "llama":
        raise ModelFormatError(
            "the GGUF file holds no sentencepiece tokenizer",
            field=f"{gguf.name} {_KEY}model",
            got=model,
            wanted="llama",
        )
    tokens = _list(metadata, "tokens", str, gguf)
    scores = _list(metadata, "scores", float, gguf, len(tokens))
    types = _list(metadata, "token_type", int, gguf, len(tokens))
    unknown = metadata.get(f"{_KEY}unknown_token_id")
    if type(unknown) is not int or not 0 <= unknown < len(tokens):
        raise ModelFormatError(
            "the unknown token is not in the vocabulary",
            field=f"{gguf.name} {_KEY}unknown_token_id",
            got=unknown,
            wanted=f"an id below {len(tokens)}",
        )
    for index, kind in enumerate(types):
        if kind == _USER_DEFINED:
            tokens[index], scores[index] = tokens[index].replace(" ", _METASPACE), 0.0
    return tokens, scores, types, unknown


def _list(metadata: Mapping[str, Any], name: str, kind: type, gguf: Path, length: int | None = None) -> list[Any]:
    values = metadata.get(_KEY + name)
    if not isinstance(values, list) or not values or any(type(value) is not kind for value in values):
        raise ModelFormatError(
            "the GGUF file has no such list",
            field=f"{gguf.name} {_KEY}{name}",
            got=type(values).__name__,
            wanted=f"a list of {kind.__name__}",
        )
    if length not in (None, len(values)):
        raise ModelFormatError(
            "the list has another length than the vocabulary",
            field=f"{gguf.name} {_KEY}{name}",
            got=len(values),
            wanted=length,
        )
    return values


def _added_tokens(tokens: Sequence[str], types: Sequence[int], rules: SentencePiece) -> dict[int, dict[str, Any]]:
    """Return the text and the flags of each added token by its id, in the order of the ids.

    The control and user-defined tokens are added tokens. The tokens that the manifest appends follow the vocabulary.
    """
    known = {tokens[index]: index for index, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)}
    if missing := [token for token in rules.special if token not in known]:
        raise ModelFormatError(
            "the manifest names special tokens that are neither control nor user-defined tokens of the GGUF file",
            field="manifest.tokenizer.sentencepiece.special",
            got=shortened(missing),
        )
    if repeated := [token for token in rules.appended if token in tokens]:
        raise ModelFormatError(
            "the manifest appends tokens that are in the vocabulary",
            field="manifest.tokenizer.sentencepiece.appended",
            got=shortened(repeated),
        )
    special = {*rules.special, *rules.appended}
    indices = known | {token: index for index, token in enumerate(rules.appended, len(tokens))}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {index: {"content": token, **flags, "special": token in special} for token, index in indices.items()}


def _json(document: Mapping[str, Any]) -> bytes:
    """Format a document as the tokenizers library and transformers do."""
    return json.dumps(document, ensure_ascii=False, indent=2).encode()
