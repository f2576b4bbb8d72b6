"""An export gets the tables of its tokenizer if they give the ids and texts of the tokenizers library."""

from __future__ import annotations

import pytest

from runtime_tests.runtime.text.test_tables import OTHERS, TOKENIZERS
from tp_export.source import tokenizer_tables
from tp_runtime.text import TableTokenizer, build_tables


@pytest.mark.parametrize("name", TOKENIZERS)
def test_equal_tables_are_exported(name: str) -> None:
    content = TOKENIZERS[name]().to_str().encode()
    assert tokenizer_tables(content) == build_tables(content) is not None


@pytest.mark.parametrize("name", OTHERS)
def test_other_tokenizers_are_exported_without_tables(name: str) -> None:
    assert tokenizer_tables(OTHERS[name]()) is None


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("_merge", lambda self, symbols: symbols),
        ("decode", lambda self, ids, skip_special_tokens: "text"),
        ("get_added_tokens_decoder", lambda self: {}),
    ],
)
def test_tables_that_differ_from_the_library_are_left_out(
    method: str, wrong: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TableTokenizer, method, wrong)
    assert tokenizer_tables(TOKENIZERS["byte-level"]().to_str().encode()) is None
