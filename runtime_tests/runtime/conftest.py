"""Fixtures: private copies of the committed exports, an open tiny model, and a patch for it.

Test modules that need another model or patch define fixtures with the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime_tests.committed import private_copy
from runtime_tests.patches import patch_for
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.session import ModelFolder


@pytest.fixture(scope="session", autouse=True)
def user_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home of the tests' own, so that no test writes to the user's."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TP_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def tiny_llama_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model, Llama-like, with the default slots."""
    return private_copy("tiny-llama", tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="session")
def tiny_llama_patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a default patch: a low-rank pair in layer 0, only a bias in layer 2, nothing in layer 1."""
    return private_copy("tiny-llama-patched", tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="session")
def tiny_gemma_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny completion-style model with post-norms and sliding layers, Gemma-3-like, with every slot."""
    return private_copy("tiny-gemma", tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def shared(tiny_llama_export: Path) -> PatchedModel:
    return PatchedModel.from_pretrained(tiny_llama_export, "cpu")


@pytest.fixture
def model(shared: PatchedModel) -> Iterator[PatchedModel]:
    """The shared model, without loaded patches and without end-of-sequence ids, so that no completion ends early."""
    eos_ids = shared.codec.eos_ids
    shared.codec.eos_ids = frozenset()
    yield shared
    shared.codec.eos_ids = eos_ids
    for name in shared.patches:
        shared.unload_patch(name)


@pytest.fixture(scope="module")
def patch(tiny_llama_export: Path) -> Patch:
    return patch_for(ModelFolder.open(tiny_llama_export), seed=1, scale=0.5)
