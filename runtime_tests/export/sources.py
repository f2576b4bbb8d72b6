"""Source models as fixtures, tiny random ones and real ones, for the conftests of the tests that need torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime_tests.export.fixtures import make_source
from tp_export.fetch import fetch


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model, Llama-like."""
    return make_source("tiny-llama", tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny completion-style model with post-norms and sliding layers, Gemma-3-like."""
    return make_source("tiny-gemma", tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, fetched (or found) as its manifest specifies."""
    return fetch("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M, fetched (or found) as its manifest specifies."""
    return fetch("gemma-3-270m")
