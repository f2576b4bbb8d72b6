"""Fixtures: the source models that the tests export in every precision, and float16 exports of tiny ones."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from runtime_tests.export.sources import smollm2, tiny_gemma, tiny_llama
from tp_export.graph import export_model
from tp_export.source import open_source

__all__ = ["smollm2", "tiny_gemma", "tiny_llama"]  # pytest finds these fixtures by their names here

DESIGNS = {"tiny_llama": "mlp", "tiny_gemma": "output"}  # with the slots that each one is exported with


@pytest.fixture(scope="session", params=product(DESIGNS, ("fp16", "int4-symmetric-fp16")), ids="-".join)
def float16_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model in a precision that computes in float16, as CUDA does."""
    design, precision = request.param
    source, out = open_source(request.getfixturevalue(design)), tmp_path_factory.mktemp("float16") / "model"
    return export_model(source, out, slot_set=DESIGNS[design], precision=precision)
