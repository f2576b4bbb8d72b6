"""Fidelity against cost: the planned fits, shorter prompts, the measured points, and answers kept at each of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.export.tiny import tiny_model
from tp_export.fit import Recipe, Settings, make_patch
from tp_export.measure import TorchStudent, diverge, measure_closeness, with_prompt, within_stop, without_prompt
from tp_export.report import STYLE, frontier, measure
from tp_export.report.figures import BOTH, ENTRIES, EXACT, SHORTER, THIS, WEIGHTS, Point
from tp_export.report.frontier_plot import frontier as draw
from tp_export.report.known import Known
from tp_export.report.shorter import shorter_prompts
from tp_export.rollout import Dialogue, Prompting, RolloutStore, dialogues_for
from tp_export.source import Source, load_model, open_source
from tp_runtime.errors import CalibrationError
from tp_runtime.patch import Patch

CONTEXT = "Bells.\none -> uno\ntwo -> due\n\nten -> dieci\n"
FITTED = ["three ->", "four ->", "five ->"]
QUERIES = ["six ->", "seven ->", "eight ->"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A completion-style model: its student's prompts differ from the teacher's in the text of the context alone."""
    return open_source(tiny_model(tmp_path_factory.mktemp("source") / "tiny", "llama", chat=False))


@pytest.fixture(scope="module")
def model(source: Source) -> Any:
    return load_model(source)


@pytest.fixture(scope="module")
def dialogues(source: Source, model: Any) -> list[Dialogue]:
    return dialogues_for(model, Prompting(source.codec, CONTEXT), QUERIES, 6)


@pytest.fixture(scope="module")
def subject(source: Source, model: Any, dialogues: list[Dialogue], tmp_path_factory: Any) -> measure.Subject:
    """A patch and held-out questions; of the two known answers the prompted model gives one."""
    recipe = Recipe(settings=Settings(4), samples=1, max_new_tokens=6)
    patch = make_patch(source, model, CONTEXT, FITTED, [], recipe, name="numbers")
    file = tmp_path_factory.mktemp("patch") / "numbers.safetensors"
    patch.save(file)
    stop = source.codec.decode(dialogues[0].completion)[-1]
    answers = {
        QUERIES[0]: within_stop(source.codec.decode(dialogues[0].completion), [stop]),
        QUERIES[1]: "something else",
    }
    return measure.Subject(Patch.load(file), file, CONTEXT, QUERIES, FITTED, answers, (stop,))


@pytest.fixture(scope="module")
def setup(source: Source, model: Any) -> measure.Setup:
    return measure.Setup(source, model, None, 6, 0, (), frontier=(2, 5), ranks=(1, 4))


@pytest.fixture(scope="module")
def held(source: Source, model: Any, subject: measure.Subject) -> list[Dialogue]:
    return dialogues_for(model, Prompting(source.codec, CONTEXT), QUERIES, 6, stop=subject.stop)


def measured(setup: measure.Setup, subject: measure.Subject, held: list[Dialogue], folder: Path) -> Any:
    store = RolloutStore(folder / "answers.jsonl", setup.source.digest)
    return frontier.measure_frontier(setup, subject, held, Known.of(setup, subject, held), store)


@pytest.fixture(scope="module")
def every_point(
    setup: measure.Setup, subject: measure.Subject, held: list[Dialogue], tmp_path_factory: Any
) -> list[Point]:
    found = measured(setup, subject, held, tmp_path_factory.mktemp("store"))
    assert found.missing == []
    return list(found.points)


@pytest.fixture(scope="module")
def points(every_point: list[Point]) -> dict[tuple[str, str], Point]:
    return {(point.series, point.label): point for point in every_point if point.dtype in ("f16", "")}


# -- the plan ------------------------------------------------------------------------------------------------


def test_the_fits_are_planned_as_recipes(subject: measure.Subject) -> None:
    plan = frontier.plan_fits(subject.patch, (1, 8), (2, 5), 48)
    assert [(one.series, one.label) for one in plan] == [
        (WEIGHTS, "r1"),
        (WEIGHTS, "r8"),
        (ENTRIES, "2"),
        (ENTRIES, "5"),
        (ENTRIES, "2"),
        (ENTRIES, "5"),
        (BOTH, "2 + r4"),
        (BOTH, "5 + r4"),
        (EXACT, "all"),
        (EXACT, "all"),
    ]
    recipes = [(one.recipe.method, one.recipe.settings.rank, one.recipe.prefix) for one in plan]
    assert recipes[1] == ("output", 8, 0) and recipes[3][::2] == ("prefix", 5) and recipes[7] == ("output", 4, 5)
    assert recipes[4:6] == recipes[2:4] and recipes[9] == recipes[8]
    assert [one.recipe.dtype for one in plan] == [*["f16"] * 4, *["i4"] * 2, *["f16"] * 3, "i4"]
    assert all(one.recipe.samples == 1 and one.recipe.max_new_tokens == 6 for one in plan)  # as the patch was fitted


def test_without_ranks_the_weights_have_that_of_the_patch(subject: measure.Subject) -> None:
    assert [one.label for one in frontier.plan_fits(subject.patch, (), (), 48)] == ["r4", "all", "all"]


# -- shorter prompts -----------------------------------------------------------------------------------------


def test_a_shorter_prompt_is_the_beginning_of_the_lines() -> None:
    assert shorter_prompts(CONTEXT) == {
        "1 of 4 lines": "Bells.",
        "2 of 4 lines": "Bells.\none -> uno",
        "3 of 4 lines": "Bells.\none -> uno\ntwo -> due",
    }
    many = shorter_prompts("\n".join(map(str, range(16))))
    assert list(many) == ["2 of 16 lines", "4 of 16 lines", "8 of 16 lines", "12 of 16 lines"]
    assert many["4 of 16 lines"] == "0\n1\n2\n3"


def test_a_prompt_of_few_lines_is_cut_after_sentences() -> None:
    assert shorter_prompts("Be kind. Be brief!\nCosts 1.50 now. Is it") == {
        "1 of 4 sentences": "Be kind.",
        "2 of 4 sentences": "Be kind. Be brief!",
        "3 of 4 sentences": "Be kind. Be brief!\nCosts 1.50 now.",
    }
    assert shorter_prompts("Answer in French.") == shorter_prompts("") == {}


# -- the points ----------------------------------------------------------------------------------------------


def test_every_point_has_its_cost(points: dict[tuple[str, str], Point], subject: measure.Subject) -> None:
    assert points[THIS, ""].bytes == subject.file.stat().st_size
    assert points[WEIGHTS, "r1"].bytes < points[WEIGHTS, "r4"].bytes < points[BOTH, "2 + r4"].bytes  # type: ignore[operator]
    assert points[ENTRIES, "2"].bytes < points[ENTRIES, "5"].bytes < points[EXACT, "all"].bytes  # type: ignore[operator]
    assert points[WEIGHTS, "r4"].context_tokens == points[THIS, ""].context_tokens == 0
    # The entries replace the BOS token of the prompt.
    assert points[ENTRIES, "5"].context_tokens == points[BOTH, "5 + r4"].context_tokens == 4
    assert points[EXACT, "all"].context_tokens == len(CONTEXT)
    assert points[SHORTER, "1 of 4 lines"].context_tokens == len("Bells.\n")
    assert points[SHORTER, "1 of 4 lines"].bytes is None


def test_the_exact_cache_is_the_prompt(points: dict[tuple[str, str], Point]) -> None:
    exact = points[EXACT, "all"].held_out
    assert exact.gap_closed == pytest.approx(1, abs=1e-3) and exact.gap_closed_first == pytest.approx(1, abs=1e-3)
    assert (exact.kept, exact.right) == (1, 0.5)  # one of the two known answers is the prompted model's
    assert points[ENTRIES, "2"].held_out.gap_closed < 0.99  # type: ignore[operator]


def test_entries_of_four_bits_are_points_of_their_own(
    every_point: list[Point], source: Source, model: Any, subject: measure.Subject, held: list[Dialogue], tmp_path: Path
) -> None:
    by_dtype = {
        dtype: {(p.series, p.label): p for p in every_point if p.dtype == dtype} for dtype in ("f16", "i8", "i4")
    }
    assert list(by_dtype["i4"]) == [(ENTRIES, "2"), (ENTRIES, "5"), (EXACT, "all")]
    assert set(by_dtype["f16"]) == set(by_dtype["i8"]) > set(by_dtype["i4"])
    coarse, fine = by_dtype["i4"][EXACT, "all"], by_dtype["i8"][EXACT, "all"]
    assert coarse.bytes < fine.bytes  # type: ignore[operator]
    assert coarse.context_tokens == fine.context_tokens
    # The point is that of a file which was fitted for four bits.
    recipe = Recipe(method="prefix", prefix=5, dtype="i4", samples=1, max_new_tokens=6)
    patch, file = make_patch(source, model, CONTEXT, FITTED, [], recipe, name="entries"), tmp_path / "p.safetensors"
    patch.save(file)
    base, own = TorchStudent(model), TorchStudent(model, Patch.load(file))
    arms = {"none": without_prompt(base), "own": without_prompt(own)}
    found = diverge(held, with_prompt(base), arms)
    figures, wanted = by_dtype["i4"][ENTRIES, "5"].held_out, measure_closeness(found["none"], found["own"])
    assert figures.kl == pytest.approx(wanted.kl, rel=1e-3)


def test_the_plot_names_the_dtypes(every_point: list[Point], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STYLE, "svg.fonttype", "none")  # letters as text
    drawn = draw(every_point)
    assert "4 bits" in drawn and "int8" in drawn
    drawn = draw([point for point in every_point if point.dtype != "i4"])
    assert "4 bits" not in drawn and "int8" in drawn


def test_a_shorter_prompt_is_measured_with_that_prompt(
    points: dict[tuple[str, str], Point], source: Source, model: Any, held: list[Dialogue]
) -> None:
    base = TorchStudent(model)
    other = [
        replace(d, student_prompt=tuple(source.codec.render(query, "Bells.\none -> uno")))
        for d, query in zip(held, QUERIES, strict=True)
    ]
    unpatched = diverge(held, with_prompt(base), {"x": without_prompt(base)})["x"]
    short = diverge(other, with_prompt(base), {"x": without_prompt(base)})["x"]
    figures, wanted = points[SHORTER, "2 of 4 lines"].held_out, measure_closeness(unpatched, short)
    assert figures.kl == pytest.approx(wanted.kl, rel=1e-4)
    assert figures.gap_closed_first == pytest.approx(wanted.gap_closed_first, rel=1e-4)
    assert figures.kept in (0, 1)


def test_what_cannot_be_made_is_named(
    setup: measure.Setup, subject: measure.Subject, held: list[Dialogue], tmp_path: Path, monkeypatch: Any
) -> None:
    unknown = replace(subject, fitted=[])
    found = measured(setup, unknown, held, tmp_path)
    assert {point.series for point in found.points} == {THIS, SHORTER}
    assert "--calibration FILE" in found.missing[0]

    def refuse(*_args: Any, name: str, **_more: Any) -> Patch:
        raise CalibrationError(f"no {name}", field="prefix")

    monkeypatch.setattr(frontier, "make_patch", refuse)
    found = measured(replace(setup, frontier=(2,), ranks=(1,)), subject, held, tmp_path)
    assert len(found.missing) == 6 and found.missing[1].startswith("entries, 2: prefix: no entries, 2")
    assert found.missing[2].startswith("entries, 2, 4 bits: ")


def test_the_plot_has_a_row_for_each_figure(points: dict[tuple[str, str], Point]) -> None:
    chosen = list(points.values())
    without = [replace(p, held_out=replace(p.held_out, kept=None, kept_se=None)) for p in chosen]
    assert len(draw(chosen)) > 1.2 * len(draw(without))
