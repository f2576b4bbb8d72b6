"""`tp-export evaluate`: the figures beside the gap closed, exact answers within the stop, and what is not known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.export.tiny import tiny_model
from tp_export import cli
from tp_export.fit import Recipe, Settings, make_patch
from tp_export.measure import answers
from tp_export.rollout import Ending, dialogues
from tp_export.source import Source, load_model, open_source
from tp_runtime.patch import Patch

CONTEXT = "one -> uno\ntwo -> due"
QUERIES = ["six ->", "seven ->", "eight ->"]
BESIDE = {"gap_closed_se", "gap_closed_first", "gap_closed_first_se", "top1_agreement", "top1_agreement_first"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(tiny_model(tmp_path_factory.mktemp("source") / "tiny", "llama", chat=False))


@pytest.fixture(scope="module")
def model(source: Source) -> Any:
    return load_model(source)


@pytest.fixture(scope="module")
def patch_file(source: Source, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(settings=Settings(4), samples=1, max_new_tokens=6)
    file = tmp_path_factory.mktemp("patch") / "numbers.safetensors"
    make_patch(source, model, CONTEXT, ["three ->", "four ->"], QUERIES, recipe, name="numbers").save(file)
    return file


def evaluate(source: Source, patch: Path, queries: Path, *more: str) -> list[str]:
    arguments = ["evaluate", str(source.path), str(patch), "--prompt", CONTEXT, "--queries", str(queries)]
    return [*arguments, "--max-new-tokens", "6", *more]


def held_out(folder: Path, answers: dict[str, str]) -> Path:
    file = folder / "held.jsonl"
    file.write_text("".join(json.dumps({"query": q, "answer": a}) + "\n" for q, a in answers.items()))
    return file


def test_answers_count_if_they_are_equal_up_to_the_stop(
    source: Source, patch_file: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompted model writes two of the three answers and goes on; without the prompt it writes all three."""
    prompted, plain = (" sei\nsette", " sette\n", " due"), (" sei", "sette\nsei", " otto \n")

    def complete(_model: Any, prompts: Any, _limit: int, ending: Ending, **_more: Any) -> list[tuple[int, ...]]:
        texts = prompted if "uno" in source.codec.decode(prompts[0]) else plain
        return [ending.cut(source.codec.render(text, raw=True)[1:]) for text in texts]  # without the BOS token

    monkeypatch.setattr(dialogues, "complete", complete)
    monkeypatch.setattr(answers, "complete", complete)
    file = held_out(tmp_path, dict(zip(QUERIES, ("sei", "sette", "otto"), strict=True)))
    assert cli.main(evaluate(source, patch_file, file, "--json", "--stop", "\n")) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) >= BESIDE and figures["completion_tokens"] == len(" sei\n") + len(" sette\n") + len(" due")
    assert {name: value for name, value in figures.items() if name.startswith("accuracy")} == {
        "accuracy_exact_prompted": 0.6667,
        "accuracy_exact_patched": 1.0,
        "accuracy_exact_unpatched": 1.0,
        "accuracy_exact_kept": 1.0,
        "accuracy_exact_kept_se": 0.0,
        "accuracy_exact_questions": 3,
    }
    assert cli.main(evaluate(source, patch_file, file)) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert BESIDE | {"accuracy_prompted", "accuracy_kept_se"} <= set(printed)
    assert int(printed["completion_tokens"]) == len("".join(prompted))  # nothing ends an answer


def test_a_patch_states_the_right_answers_that_it_keeps(source: Source, tmp_path: Path, capsys: Any) -> None:
    queries = tmp_path / "queries.txt"
    queries.write_text("three ->\nfour ->\n")
    file = held_out(tmp_path, dict.fromkeys(QUERIES, "no such answer"))
    out = tmp_path / "p.safetensors"
    options = ["--queries", str(queries), "--held-out", str(file), "--max-new-tokens", "6", "--prefix", "all"]
    assert cli.main(["patch", str(source.path), str(out), "--prompt", CONTEXT, *options]) == 0
    stored = Patch.load(out).config.fidelity
    assert stored is not None and stored["accuracy_prompted"] == 0 and stored["accuracy_questions"] == 3
    assert "accuracy_kept" not in stored and set(stored) >= BESIDE
    assert "held out: " in capsys.readouterr().err


def test_nothing_to_keep_is_said(source: Source, patch_file: Path, tmp_path: Path, capsys: Any) -> None:
    file = held_out(tmp_path, dict.fromkeys(QUERIES, "no such answer"))
    assert cli.main(evaluate(source, patch_file, file, "--json")) == 0
    captured = capsys.readouterr()
    assert not any(name.startswith("accuracy_kept") for name in json.loads(captured.out))
    assert "note: the prompted model answers no question correctly" in captured.err


def test_a_first_token_on_which_the_prompt_has_no_effect_is_said(
    source: Source, patch_file: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tp_export import measure
    from tp_export.measure import Fidelity

    measured = Fidelity(0.5, 0.1, 0.8, 0.01, 1e-9, None, None, 0.9, 1.0, 0.5, 12, 3)
    monkeypatch.setattr(measure, "measure_fidelity", lambda *_args: measured)
    queries = tmp_path / "held.txt"
    queries.write_text("\n".join(QUERIES))
    assert cli.main(evaluate(source, patch_file, queries, "--json")) == 0
    captured = capsys.readouterr()
    assert "gap_closed_first" not in json.loads(captured.out)
    assert "no effect on the first token of the answers (KL 1.0e-09)" in captured.err


@pytest.mark.parametrize(("stop", "message"), [("", "the stop string is empty"), ("##", "got '##'")])
def test_a_stop_that_ends_no_answer_is_refused(
    stop: str, message: str, source: Source, patch_file: Path, tmp_path: Path, capsys: Any
) -> None:
    queries = tmp_path / "held.txt"
    queries.write_text("\n".join(QUERIES))
    assert cli.main(evaluate(source, patch_file, queries, "--stop", stop)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "error: --stop: " in captured.err and message in captured.err
