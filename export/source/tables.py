"""The tables of a tokenizer.json for an export, compared with the tokenizers library before they are used."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from tp_runtime.text import TABLES, TableTokenizer, build_tables, read_tables

from .token_ids import TEXTS

_COMPARED = 50  # the number of added tokens that are compared within texts
_DECODED = 2000  # the number of ids, spread over the vocabulary, that are decoded


def tokenizer_tables(tokenizer: bytes) -> bytes | None:
    """Return the tables of a tokenizer.json that the tokenizers library accepts.

    Returns:
        The file; None if the tables do not give the ids and texts of the library, or cannot be made.
    """
    content = build_tables(tokenizer)
    if content is None:
        return None
    library = Tokenizer.from_buffer(tokenizer)
    library.no_truncation()
    library.no_padding()
    tables = read_tables(content, hashlib.sha256(tokenizer).hexdigest(), TABLES)
    return content if _are_equal(TableTokenizer(tables, lambda: library, budget=math.inf), library) else None


def _are_equal(tables: TableTokenizer, library: Any) -> bool:
    added = library.get_added_tokens_decoder()
    if {token.id: token.content for token in tables.get_added_tokens_decoder().values()} != {
        index: token.content for index, token in added.items()
    }:
        return False
    for text in _texts([added[index].content for index in sorted(added)]):
        for with_special in (False, True):
            got, wanted = (each.encode(text, add_special_tokens=with_special) for each in (tables, library))
            if (got.ids, got.special_tokens_mask) != (wanted.ids, wanted.special_tokens_mask):
                return False
    size = library.get_vocab_size(with_added_tokens=True)
    spread = list(range(0, size + 1, max(1, size // _DECODED)))
    return all(
        tables.decode(ids, skip_special_tokens=skip) == library.decode(ids, skip_special_tokens=skip)
        for ids in (spread, sorted(added))
        for skip in (True, False)
    )


def _texts(added: list[str]) -> Iterator[str]:
    yield from TEXTS
    for token in added[:: max(1, len(added) // _COMPARED)]:
        yield f"a{token}b {token} c  {token}{token}\n{token} {token.upper()}{token.lower()} d{token}"
