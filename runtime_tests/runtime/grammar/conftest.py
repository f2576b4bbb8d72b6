"""Fixtures: the grammars of a small model. Without llguidance, the tests of this folder are skipped."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from runtime_tests.vocabularies import END, TOKENIZERS, TURN
from tp_runtime.grammar import Grammars

pytest.importorskip("llguidance")


@pytest.fixture(scope="session", params=sorted(TOKENIZERS))
def kind_of_tokenizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def tokenizer(kind_of_tokenizer: str) -> Tokenizer:
    return TOKENIZERS[kind_of_tokenizer]()


@pytest.fixture(scope="session")
def eos_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tokenizer.token_to_id(END), tokenizer.token_to_id(TURN)


@pytest.fixture(scope="session")
def width(tokenizer: Tokenizer) -> int:
    """More logits than the tokenizer has ids, as models that round their vocabulary up have."""
    return int(tokenizer.get_vocab_size()) + 45


@pytest.fixture(scope="session")
def grammars(tokenizer: Tokenizer, eos_ids: tuple[int, ...], width: int) -> Grammars:
    return Grammars(tokenizer, eos_ids, width)
