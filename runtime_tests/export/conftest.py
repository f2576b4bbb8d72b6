"""Fixtures: source models and their exports, each made once per test session by the code under test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime_tests.export.fixtures import make_folder
from runtime_tests.export.sources import gemma3, smollm2, tiny_gemma, tiny_llama
from tp_export.fit import student
from tp_export.graph import export_model
from tp_export.source import open_source

__all__ = ["gemma3", "smollm2", "tiny_gemma", "tiny_llama"]  # pytest finds these fixtures by their names here


@pytest.fixture(scope="session", autouse=True)
def short_calibration() -> Iterator[None]:
    """Calibrate quantisers on less text than users get: a tiny model is no better with more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student, "QUESTIONS", 32)
        patch.setattr(student, "LONGEST", 64)
        yield


@pytest.fixture(scope="session")
def tiny_llama_export(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama`, exported with the default slots."""
    return make_folder("tiny-llama", open_source(tiny_llama), tmp_path_factory.mktemp("export") / "llama")


@pytest.fixture(scope="session")
def tiny_gemma_export(tiny_gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_gemma`, exported with every slot."""
    return make_folder("tiny-gemma", open_source(tiny_gemma), tmp_path_factory.mktemp("export") / "gemma")


@pytest.fixture(scope="session")
def smollm2_export(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2, exported with the default slots."""
    return export_model(open_source(smollm2), tmp_path_factory.mktemp("export") / "smollm2")


@pytest.fixture(scope="session")
def gemma3_export(gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M, exported with the default slots."""
    return export_model(open_source(gemma3), tmp_path_factory.mktemp("export") / "gemma3")
