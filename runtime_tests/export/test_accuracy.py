"""Right and wrong answers: which file holds them, what counts, and what of the prompted model's the patch keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tp_export import accuracy
from tp_export.accuracy import load_answers, measure_accuracy
from tp_export.questions import load_questions
from tp_export.source import load_model, open_source

from runtime_tests.patches import patch_for, random_config
from tp_runtime.errors import CalibrationError
from tp_runtime.folder import ModelFolder
from tp_runtime.patch import Patch

LINES = [{"query": "Who leads it?", "answer": "Ingrid"}, {"query": " When? ", "answer": "nine"}]


def write(folder: Path, *lines: Any) -> Path:
    file = folder / "held.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_one_file_gives_queries_and_answers(tmp_path: Path) -> None:
    file = write(tmp_path, *LINES, "A query without an answer?")
    assert load_questions(file) == ["Who leads it?", "When?", "A query without an answer?"]
    assert load_answers(file) == {"Who leads it?": "Ingrid", "When?": "nine"}
    plain = tmp_path / "held.txt"
    plain.write_text("Who leads it?\n")
    assert load_answers(plain) == {}


@pytest.mark.parametrize("line", [{"query": "x"}, {"query": "x", "answer": " "}, {"query": "x", "answer": 7}])
def test_half_an_entry_is_refused(tmp_path: Path, line: Any) -> None:
    with pytest.raises(CalibrationError, match=r"held\.jsonl, line 1.*wanted"):
        load_answers(write(tmp_path, line))


@pytest.mark.parametrize("line", [{"answer": "x"}, {"query": 3, "answer": "x"}, 3])
def test_a_line_that_is_no_query_is_refused(tmp_path: Path, line: Any) -> None:
    with pytest.raises(CalibrationError, match="something else than text"):
        load_questions(write(tmp_path, line))


def test_what_counts(tiny_llama: Path, tiny_llama_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompted 3 of 4, patched 2 of 4, of which 2 are among the prompted model's 3."""
    source = open_source(tiny_llama)
    answers = {"a?": "Nine", "b?": "six", "c?": "Oyelaran", "d?": "Mill"}
    texts = {
        "framed": ["It is NINE.", "At six.", "Marta Oyelaran", "no"],
        "patched": ["nine", "seven", "oyelaran", "no"],
        "plain": ["no", "no", "no", "on Mill Street"],
    }
    model = load_model(source)
    patch = patch_for(ModelFolder.open(tiny_llama_export))

    def complete(_model: Any, prompts: Any, *_: Any, **__: Any) -> list[tuple[int, ...]]:
        way = "framed" if "Context" in source.codec.decode(prompts[0]) else ways.pop()
        return [tuple(source.codec.render(text, raw=True)) for text in texts[way]]

    ways = ["plain", "patched"]
    monkeypatch.setattr(accuracy, "complete", complete)
    found = measure_accuracy(source, model, "Context", patch, answers, 8)
    assert (found.prompted, found.patched, found.unpatched) == (3 / 4, 2 / 4, 1 / 4)
    assert found.kept == pytest.approx(2 / 3) and found.questions == 4
    assert found.to_dict()["accuracy_kept"] == 0.6667


def test_a_real_run_and_none(tiny_llama: Path) -> None:
    source = open_source(tiny_llama)
    model = load_model(source)
    none = Patch({}, random_config())
    found = measure_accuracy(source, model, "Be kind.", none, {"Who?": "no model says this"}, 4)
    assert found.prompted == found.patched == 0 and found.kept == 1
    with pytest.raises(CalibrationError, match="no questions with answers"):
        measure_accuracy(source, model, "Be kind.", none, {}, 4)
