"""Fixtures of the report's tests: two patches of a tiny model, held-out queries, and the full report on both.

The report takes long, and no test changes it or the patches, so all tests share one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tp_export.cli import main as tp_export_main
from tp_export.queries import load_questions
from tp_export.report import compare, describe_report, measure
from tp_export.report.figures import Report
from tp_export.report.page import render_page
from tp_export.rollout import Dialogue, Prompting, dialogues_for
from tp_export.source import load_model, open_source
from tp_runtime.patch import Patch
from tp_runtime.session import Graph, ModelFolder

PIRATE = "Always talk like a pirate, and mention the sea in every single answer."
FRENCH = "Answer in French."
QUERIES = [
    "Is tea better than coffee?",
    "How far is the moon?",
    "What is a <b>tag</b>?",
    "Who sells lamps?",
    "Why do cats purr?",
]


@pytest.fixture(scope="package")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("queries") / "held.txt"
    file.write_text("\n".join(QUERIES))
    return file


@pytest.fixture(scope="package")
def files(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("patches")
    made = []
    for name, prompt in (("pirate", PIRATE), ("french", FRENCH)):
        made.append(folder / f"{name}.safetensors")
        options = ["--limit=6", "--holdout=0", "--max-new-tokens=6", "--rank=4"]
        assert tp_export_main(["patch", str(tiny_llama), str(made[-1]), "--prompt", prompt, *options]) == 0
    return made


@pytest.fixture(scope="package")
def model(tiny_llama: Path) -> Any:
    return load_model(open_source(tiny_llama))


@pytest.fixture(scope="package")
def report(files: list[Path], tiny_llama: Path, tiny_llama_export: Path, model: Any) -> Report:
    """The full report of two patches; measurements of the runtime use the exported graph."""
    graph = Graph(ModelFolder.open(tiny_llama_export), "cpu")
    setup = measure.Setup(open_source(tiny_llama), model, graph, 6, 8, compare.METHODS, (2, 8))
    subjects = []
    for file, prompt in zip(files, (PIRATE, FRENCH), strict=True):
        patch = Patch.load(file)
        fitted = compare.fitted_queries(patch, load_questions(None))
        subjects.append(measure.Subject(patch, file, prompt, QUERIES, fitted))
    parts = [measure.measure_patch(setup, subject) for subject in subjects]
    return describe_report(setup, parts, measure.measure_composition(setup, subjects))


@pytest.fixture(scope="package")
def whole(report: Report) -> tuple[dict[str, Any], str]:
    """The JSON and the page of the report."""
    return json.loads(json.dumps(report.to_dict())), render_page(report)


@pytest.fixture(scope="package")
def dialogues(tiny_llama: Path, model: Any) -> list[Dialogue]:
    return dialogues_for(model, Prompting(open_source(tiny_llama).codec, PIRATE), QUERIES, 6)
