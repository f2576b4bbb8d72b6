"""Hostile values in the files that the host reads, and library errors that it quotes: only this project's errors."""

from __future__ import annotations

import argparse
import json
import random
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from runtime_tests.export.formats.test_control_vector import written
from runtime_tests.hostile import check_error, some_variants
from runtime_tests.patches import random_patch
from tp_export.cli.options import read_context
from tp_export.fetch.manifest import parse_manifest
from tp_export.formats import read_control_vector
from tp_export.graph.export import _reason
from tp_export.queries import load_questions
from tp_export.report import store_summary
from tp_export.rollout import RolloutStore
from tp_runtime.errors import CalibrationError, ModelFormatError, OutputError, PatchError
from tp_runtime.patch import Patch


def test_any_hostile_value_in_a_manifest_is_read_or_refused() -> None:
    document = json.loads((files("tp_export.manifests") / "gemma-3-270m.json").read_text(encoding="utf-8"))
    for what, text in some_variants(document, 500):
        try:
            parse_manifest(text)
        except ModelFormatError as error:
            check_error(error, what)


def test_any_hostile_value_in_a_file_of_questions_is_read_or_refused(tmp_path: Path) -> None:
    for what, text in some_variants({"query": "a", "answer": "b"}, 200):
        for name, content in (("q.jsonl", text), ("q.json", f'["a", {text}]')):
            (tmp_path / name).write_text(content, encoding="utf-8")
            try:
                assert all(query.encode() for query in load_questions(tmp_path / name))
            except CalibrationError as error:
                check_error(error, what)


def test_any_hostile_value_in_a_file_of_rollouts_is_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "rollouts.jsonl"
    for what, text in some_variants({"asked": "a", "answer": [1, 2]}, 200):
        file.write_text(text + "\n", encoding="utf-8")
        try:
            store = RolloutStore(file, "0" * 64)
            np.array(store.get("a") or (), np.int32)
        except CalibrationError as error:
            check_error(error, what)


@pytest.mark.parametrize("answer", ["[-1]", "[2147483648]", '["1"]', "[1.5]", "[true]"])
def test_a_stored_completion_that_holds_no_token_ids_is_refused(tmp_path: Path, answer: str) -> None:
    file = tmp_path / "rollouts.jsonl"
    file.write_text(f'{{"asked": "a", "answer": {answer}}}\n')
    with pytest.raises(CalibrationError, match="the line is not a stored completion"):
        RolloutStore(file, "0" * 64)


def test_a_control_vector_with_changed_bytes_is_read_or_refused(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 64}
    values = np.ones(64, np.float32)
    whole = written(tmp_path / "v.gguf", {"direction.1": values, "direction.2": values}).read_bytes()
    rng = random.Random(0)
    for attempt in range(300):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(400)] = rng.choice((rng.randrange(256), 255, 0))  # in the header
        (tmp_path / "damaged.gguf").write_bytes(content)
        try:
            read_control_vector(tmp_path / "damaged.gguf", config)
        except PatchError as error:
            check_error(error, str(attempt))


def test_a_prompt_on_the_command_line_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"--prompt: the text is not valid Unicode; got '\\udcff'"):
        read_context(argparse.Namespace(prompt="hi \udcff", prompt_file=None))


def test_a_patch_file_that_changed_while_a_report_was_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "p.safetensors"
    random_patch().save(file)
    patch = Patch.load(file)
    file.write_bytes(b"something else")
    monkeypatch.setattr("tp_export.report.store.summary", lambda _report: {"gap_closed": 0.9})
    with pytest.raises(OutputError, match="is not replaced"):
        store_summary(file, patch, None)  # type: ignore[arg-type]
    assert file.read_bytes() == b"something else"


def test_the_reason_of_an_exporter_is_one_bounded_printable_line() -> None:
    first = RuntimeError("bad\x1b[2J" + "x" * 10_000 + "\n" + "pages of advice\n" * 10_000)
    last = ValueError("wrapped")
    last.__cause__ = first
    assert _reason(last).startswith(r"RuntimeError: bad\x1b[2Jx") and "advice" not in _reason(last)
    assert len(_reason(last)) < 400 and _reason(last).isprintable()
