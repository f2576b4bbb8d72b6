"""Files of queries: the built-in questions, the file formats, and the split into fitted and held-out queries."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import pytest

from tp_export.queries import check_disjoint, load_questions, split_holdout
from tp_runtime.errors import CalibrationError


def test_the_built_in_questions_are_many_and_different() -> None:
    questions = load_questions(None)
    assert len(questions) >= 200
    assert all(question == question.strip() and not question.startswith("#") for question in questions)
    lengths = [len(question.split()) for question in questions]
    assert min(lengths) <= 2 and max(lengths) >= 16
    folded = sorted(question.casefold() for question in questions)
    assert len(set(folded)) == len(folded)


def test_no_two_built_in_questions_are_nearly_the_same() -> None:
    questions = [question.casefold() for question in load_questions(None)]
    matcher = difflib.SequenceMatcher()
    for index, question in enumerate(questions):
        matcher.set_seq2(question)
        for other in questions[:index]:
            matcher.set_seq1(other)
            alike = matcher.real_quick_ratio() > 0.8 and matcher.quick_ratio() > 0.8 and matcher.ratio() > 0.8
            assert not alike, (question, other)


def test_text_lines_are_stripped_and_comments_blank_lines_and_repetitions_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "q.txt"
    path.write_text("\ufeff# a comment\n  Hello?  \n\n  # another\nWhy # not?\nhello?\nWhy # not?\n", encoding="utf-8")
    assert load_questions(path) == ["Hello?", "Why # not?"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_keeps_lines_that_look_like_comments(tmp_path: Path, suffix: str) -> None:
    queries = ["# heading, please", "two\nlines", "naïve?"]
    path = tmp_path / f"q{suffix}"
    path.write_text(json.dumps(queries) if suffix == ".json" else "\n\n".join(map(json.dumps, queries)), "utf-8")
    assert load_questions(path) == queries


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.txt", b"", "holds no query"),
        ("q.txt", b"# only\n   \n", "holds no query"),
        ("q.json", b"[]", "holds no query"),
        ("q.json", b'["  "]', "holds no query"),
        ("q.json", b'{"a": 1}', "a list of strings"),
        ("q.json", b'["a", 1]', "a list of strings"),
        ("q.json", b'["a",', "cannot be read"),
        ("q.jsonl", b'"a"\n{"text": "b"}', "lines with a JSON string"),
        ("q.txt", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_without_queries_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        load_questions(path)
    assert name in str(caught.value)


def test_a_missing_file_raises_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_questions(tmp_path / "none.txt")


def test_the_split_is_a_repeatable_partition_in_order() -> None:
    questions = load_questions(None)
    fit, held = split_holdout(questions, 40, seed=7)
    assert (fit, held) == split_holdout(questions, 40, seed=7)
    assert len(held) == 40 and sorted(fit + held) == sorted(questions)
    assert held == [question for question in questions if question in set(held)]
    assert held != split_holdout(questions, 40, seed=8)[1]


def test_the_split_does_not_depend_on_order_and_hardly_on_additions() -> None:
    questions = load_questions(None)
    _, held = split_holdout(questions, 40, seed=0)
    assert set(split_holdout(questions[::-1], 40, seed=0)[1]) == set(held)
    _, grown = split_holdout([*questions, "One more?"], 40, seed=0)
    assert len(set(grown) & set(held)) >= 39


def test_a_holdout_of_zero_leaves_all_queries_to_fit() -> None:
    assert split_holdout(["a", "b"], 0, seed=0) == (["a", "b"], [])


@pytest.mark.parametrize("holdout", [-1, 2, 3])
def test_holding_out_everything_is_refused(holdout: int) -> None:
    with pytest.raises(CalibrationError, match="holdout"):
        split_holdout(["a", "b"], holdout, seed=0)


def test_queries_that_are_fitted_and_held_out_are_named() -> None:
    check_disjoint(["a", "b"], ["c"])
    with pytest.raises(CalibrationError, match=r"'WHO  are you\?'"):
        check_disjoint(["Hi", "Who are you? "], ["Bye", "WHO  are you?"])
    with pytest.raises(CalibrationError, match="and 2 more"):
        check_disjoint("abcdefg", "ABCDEFG")
