"""The source model of the tests of precisions; a module that needs another one has a fixture of its own."""

from __future__ import annotations

from typing import Any

import pytest

from runtime_tests.export.tiny import tiny_model
from tp_export.source import Source, load_model, open_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A model with a head tied to the embedding, as in small real models, and widths that are whole blocks."""
    folder = tmp_path_factory.mktemp("tied")
    return open_source(tiny_model(folder, "llama", tie_word_embeddings=True, intermediate_size=128))


@pytest.fixture(scope="module")
def model(source: Source) -> Any:
    return load_model(source)
