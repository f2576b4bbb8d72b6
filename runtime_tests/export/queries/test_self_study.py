"""Self-study: the statements that questions are written about, what counts as a question, and the command."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tp_export import cli
from tp_export.queries import self_study, statements, write_questions
from tp_export.queries.self_study import question_in
from tp_export.source import load_model, open_source
from tp_runtime.errors import CalibrationError, RequestError

MODEL = SimpleNamespace(  # the rollout is faked
    config=SimpleNamespace(max_position_embeddings=512),
    get_input_embeddings=lambda: SimpleNamespace(num_embeddings=320),
)
DOCUMENT = """# The shop
- We open at nine. We close at six.
* 1st of May: closed

Ask for Ingrid Solheim, who leads it!
ok
"""


def test_every_line_and_sentence_is_a_statement() -> None:
    assert statements(DOCUMENT) == [
        "We open at nine.",
        "We close at six.",
        "1st of May: closed",
        "Ask for Ingrid Solheim, who leads it!",
    ]


@pytest.mark.parametrize(
    ("answer", "question"),
    [
        ("When does the shop open?", "When does the shop open?"),
        ('Sure! Here is one:\n1. "When does it open?" I hope this helps.', "When does it open?"),
        ("Question: Who leads the shop? Ingrid.", "Who leads the shop?"),
        ("The shop opens at nine.", None),
        ("Why? Because.", None),
        ("What opens at 9:30 on every Monday?", "What opens at 9:30 on every Monday?"),
        ("Is it 3.5 kg for a small box?", "Is it 3.5 kg for a small box?"),
        ("2024 was the year of what?", "2024 was the year of what?"),
    ],
)
def test_the_question_is_extracted_from_an_answer(answer: str, question: str | None) -> None:
    assert question_in(answer) == question


def fake_answers(monkeypatch: pytest.MonkeyPatch, source: Any, texts: list[str]) -> list[dict[str, Any]]:
    """Make the rollout answer with `texts` in a cycle, and return the list of the requests that it gets."""
    requests: list[dict[str, Any]] = []

    def complete(_model: Any, prompts: Any, *_: Any, **options: Any) -> list[tuple[int, ...]]:
        answers = [texts[(len(requests) + i) % len(texts)] for i in range(len(prompts))]
        requests.extend({"prompt": source.codec.decode(prompt), **options} for prompt in prompts)
        return [tuple(source.codec.render(text, raw=True)) for text in answers]

    monkeypatch.setattr(self_study, "complete", complete)
    return requests


def test_every_round_asks_about_every_line_and_includes_the_document(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(tiny_llama)
    requests = fake_answers(
        monkeypatch, source, ["When does it open?", "when does  it open?", "Nine.", "Who leads it?"]
    )
    assert write_questions(source, MODEL, DOCUMENT, 6) == ["When does it open?", "Who leads it?"]
    assert len(requests) == 6 * 4 and len({(r["prompt"], r["seed"]) for r in requests}) == len(requests)
    assert all("We close at six." in r["prompt"] for r in requests)
    assert requests[0]["temperature"] == 0 < requests[-1]["temperature"]  # greedy once per wording, then sampled


def test_a_document_without_questions_is_refused(
    tiny_llama: Path, tiny_gemma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(tiny_llama)
    fake_answers(monkeypatch, source, ["No idea."])
    with pytest.raises(CalibrationError, match="wrote no question"):
        write_questions(source, MODEL, DOCUMENT, 2)
    with pytest.raises(CalibrationError, match="the document is empty"):
        write_questions(source, MODEL, " \n", 2)
    with pytest.raises(RequestError, match="context window"):
        write_questions(source, MODEL, DOCUMENT * 10, 2)
    base = open_source(tiny_gemma)
    assert base.codec.style == "completion"
    with pytest.raises(CalibrationError, match="completion-style"):
        write_questions(base, MODEL, DOCUMENT, 2)


def test_the_command_writes_the_file_or_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document, out = tmp_path / "d.txt", tmp_path / "q.txt"
    document.write_text(DOCUMENT)
    fake_answers(monkeypatch, open_source(tiny_llama), ["When does it open?", "Who leads it?"])
    assert cli.main(["questions", str(tiny_llama), str(document), str(out), "--rounds=1"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_text() == "When does it open?\nWho leads it?\n"
    fake_answers(monkeypatch, open_source(tiny_llama), ["No."])
    assert cli.main(["questions", str(tiny_llama), str(document), str(tmp_path / "none.txt")]) == 2
    assert not (tmp_path / "none.txt").exists()
    assert cli.main(["questions", str(tiny_llama), str(document), str(out), "--rounds=0"]) == 2


def test_a_real_rollout_runs(tiny_llama: Path) -> None:
    """A model with random weights writes no question, but every step before that works."""
    source = open_source(tiny_llama)
    with pytest.raises(CalibrationError, match="4 answers"):
        write_questions(source, load_model(source), DOCUMENT, 1)
