"""Right and wrong answers: the file of expected answers, which answers count, and how many a patch keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_export.fit import Recipe, make_patch
from tp_export.measure import (
    measure_accuracy,
    ratio_error,
    recorded_answers,
    runtime_answers,
    torch_answers,
    within_stop,
)
from tp_export.measure.accuracy import Answers
from tp_export.queries import load_answers, load_questions
from tp_export.rollout import Dialogue, Prompting
from tp_export.source import load_model, open_source
from tp_runtime.errors import CalibrationError, RequestError
from tp_runtime.patch import Patch
from tp_runtime.session import Graph, ModelFolder

LINES = [{"query": "Who leads it?", "answer": "Ingrid"}, {"query": " When? ", "answer": "nine"}]


def write(folder: Path, *lines: Any) -> Path:
    file = folder / "held.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_queries_and_answers_are_read_from_one_file(tmp_path: Path) -> None:
    file = write(tmp_path, *LINES, "A query without an answer?", {"query": "Nor has this?", "id": 3})
    assert load_questions(file) == ["Who leads it?", "When?", "A query without an answer?", "Nor has this?"]
    assert load_answers(file) == {"Who leads it?": "Ingrid", "When?": "nine"}
    plain = tmp_path / "held.txt"
    plain.write_text("Who leads it?\n")
    assert load_answers(plain) == {}


@pytest.mark.parametrize("line", [{"answer": "x"}, {"query": "x", "answer": " "}, {"query": "x", "answer": 7}])
def test_an_entry_without_a_query_or_an_answer_is_refused(tmp_path: Path, line: Any) -> None:
    with pytest.raises(CalibrationError, match=r"held\.jsonl, line 1.*wanted"):
        load_answers(write(tmp_path, line))


@pytest.mark.parametrize("line", [{"answer": "x"}, {"query": 3, "answer": "x"}, 3])
def test_a_line_without_a_query_is_refused(tmp_path: Path, line: Any) -> None:
    with pytest.raises(CalibrationError, match="the file holds an entry that is not text"):
        load_questions(write(tmp_path, line))


def test_answers_that_contain_the_expected_words_count_as_correct(tiny_llama: Path) -> None:
    """The prompted model answers 3 of 4 correctly. The patched one answers 2 of 4 correctly, both among those 3."""
    source = open_source(tiny_llama)
    answers = {"a?": "Nine", "b?": "six", "c?": "Oyelaran", "d?": "16"}
    prompts_run = []

    def answering(*texts: str) -> Answers:
        def run(prompts: Any, _label: str) -> list[tuple[int, ...]]:
            prompts_run.append(source.codec.decode(prompts[0]))
            return [tuple(source.codec.render(text, raw=True)) for text in texts]

        return run

    prompted = answering("It is NINE.", "At six.", "Marta Oyelaran", "no")
    unpatched = answering("ninety", "sixteen", "no", "it is 16")  # only whole words count: 36 is not 6
    patched = answering("nine", "seven", "oyelaran", "116")
    found = measure_accuracy(Prompting(source.codec, "Context"), answers, prompted, unpatched, patched)
    assert (found.prompted, found.unpatched, found.patched) == (3 / 4, 1 / 4, 2 / 4)
    assert found.kept == pytest.approx(2 / 3) and found.questions == 4
    assert found.kept_se == ratio_error([1, 0, 1, 0], [1, 1, 1, 0])
    assert found.to_dict()["accuracy_kept"] == 0.6667 and found.to_dict()["accuracy_questions"] == 4
    assert ["Context" in text for text in prompts_run] == [True, False, False]
    with pytest.raises(CalibrationError, match="no question has an expected answer"):
        measure_accuracy(Prompting(source.codec, "Context"), {}, prompted, unpatched, patched)


def test_with_a_stop_string_only_an_equal_answer_counts(tiny_llama: Path) -> None:
    source = open_source(tiny_llama)
    answers = {"a?": "bug", "b?": "login", "c?": "{}", "d?": "sales"}

    def answering(*texts: str) -> Answers:
        return lambda _prompts, _label: [tuple(source.codec.render(text, raw=True)) for text in texts]

    prompted = answering(" bug\nlogin", " login\n", "{}\n", "praise\nsales\n")  # what follows does not count
    unpatched = answering("a bug\n", "Login\n", "{ }\n", "sale\n")
    patched = answering("bug", "sales\nlogin\n", "{}\n\n", "sales\n")
    found = measure_accuracy(Prompting(source.codec, "Context"), answers, prompted, unpatched, patched, ["\n"])
    assert (found.exact, found.prompted, found.unpatched, found.patched) == (True, 3 / 4, 0, 3 / 4)
    assert found.to_dict() == {
        "accuracy_exact_prompted": 0.75,
        "accuracy_exact_patched": 0.75,
        "accuracy_exact_unpatched": 0.0,
        "accuracy_exact_kept": 0.6667,
        "accuracy_exact_kept_se": round(ratio_error([1, 0, 1, 0], [1, 1, 1, 0]) or 0, 4),
        "accuracy_exact_questions": 4,
    }


def test_a_prompted_model_that_answers_nothing_correctly_leaves_nothing_to_keep(tiny_llama: Path) -> None:
    source = open_source(tiny_llama)

    def no(_prompts: Any, _label: str) -> list[tuple[int, ...]]:
        return [tuple(source.codec.render("no", raw=True))]

    found = measure_accuracy(Prompting(source.codec, "Context"), {"a?": "yes"}, no, no, no)
    assert found.kept is None and not {"accuracy_kept", "accuracy_kept_se"} & set(found.to_dict())


@pytest.mark.parametrize("entries", [0, 5])
def test_torch_and_the_runtime_give_the_same_answers(tiny_llama: Path, tiny_llama_export: Path, entries: int) -> None:
    source = open_source(tiny_llama)
    model, graph = load_model(source), Graph(ModelFolder.open(tiny_llama_export), "cpu")
    prompts = [source.codec.render(text) for text in ("Hello", "Who is there?")]
    patch = patch_for(graph.folder, scale=0.3)
    if entries:
        recipe = Recipe(method="prefix", prefix=entries, samples=1, max_new_tokens=4)
        made = make_patch(source, model, "Talk like a pirate.", ["Hello"], [], recipe, name="entries")
        patch = Patch(patch.deltas, patch.config, made.prefix)
    for choice in (None, patch):
        by_torch = torch_answers(source, model, choice, 6)(prompts, "")
        assert runtime_answers(source, graph, choice, 6)(prompts, "") == by_torch
        stop = [source.codec.decode(by_torch[0])[2]]
        cut = torch_answers(source, model, choice, 6, stop)(prompts, "")
        assert runtime_answers(source, graph, choice, 6, stop)(prompts, "") == cut
        assert source.codec.decode(cut[0]) == source.codec.decode(by_torch[0]).partition(stop[0])[0] + stop[0]


def test_prompts_that_entries_do_not_fit_are_refused(tiny_llama: Path, tiny_llama_export: Path) -> None:
    """By transformers as by the runtime: the answers would be those of another prompt."""
    source = open_source(tiny_llama)
    model, graph = load_model(source), Graph(ModelFolder.open(tiny_llama_export), "cpu")
    patch = with_prefix(patch_for(graph.folder), graph.folder, source.codec.render("Hello")[:22])
    for answers in (torch_answers(source, model, patch, 2), runtime_answers(source, graph, patch, 2)):
        with pytest.raises(RequestError, match="does not start as the patch's KV prefix requires"):
            answers([source.codec.render("Hello", "Be brief.")], "")


def test_recorded_answers_are_those_of_the_dialogues() -> None:
    dialogues = [Dialogue((1, 2), (2,), (5, 6)), Dialogue((1, 3), (3,), (7,)), Dialogue((1, 2), (2,), (8,))]
    assert recorded_answers(dialogues)([[1, 3], [1, 2]], "") == [(7,), (5, 6)]
    with pytest.raises(KeyError):
        recorded_answers(dialogues)([[4]], "")


def test_the_text_within_the_stop_is_the_text_that_a_request_returns() -> None:
    assert within_stop("six -> seven\n", ["\n", "->"]) == "six "
    assert within_stop("six -", ["->"]) == "six -"
    assert within_stop("six\n", []) == "six\n"
