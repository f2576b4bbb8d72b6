"""From a prompt to a patch file through the command line, on a tiny model: figures, errors, no half-written file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.patches import random_patch
from tp_export import cli
from tp_export.fit import Recipe, calibration, closed_form, fit_lockstep, make
from tp_export.fit.calibration import Calibration
from tp_export.fit.lockstep import Behind
from tp_export.queries import load_questions
from tp_export.report import fitted_queries
from tp_export.rollout import dialogues
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch

CONTEXT = "Always talk like a pirate, and mention the sea in every single answer."


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("queries") / "held.txt"
    file.write_text("Is tea better than coffee?\nHow far is the moon?\n")
    return file


def patch_arguments(source: Path, out: Path, **changes: Any) -> list[str]:
    options = {"prompt": CONTEXT, "limit": 6, "holdout": 2, "max-new-tokens": 6, "rank": 4} | changes
    return [
        "patch",
        str(source),
        str(out),
        *(f"--{key}={value}" for key, value in options.items() if value is not None),
    ]


@pytest.fixture(scope="module")
def patch_file(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("patch") / "pirate.safetensors"
    assert cli.main(patch_arguments(tiny_llama, out)) == 0
    return out


def test_the_file_contains_its_description(patch_file: Path) -> None:
    config = Patch.load(patch_file).config
    assert (config.name, config.method, config.architecture, config.precision) == ("pirate", "output", "llama", "fp32")
    assert config.calibration is not None and config.calibration["queries"] == 6
    assert config.fidelity is not None and config.fidelity["queries"] == 2
    assert config.fidelity["gap_closed"] < 1
    assert config.context is None and len(config.context_digest) == 64


def test_the_probe_passes_on_the_exported_graph(patch_file: Path, tiny_llama_export: Path) -> None:
    model = PatchedModel.from_pretrained(tiny_llama_export, device="cpu")
    name = model.load_patch(patch_file, check=True)
    assert model.check(name).top1_agreement == 1.0


@pytest.mark.parametrize("through_runtime", [False, True])
def test_evaluate_prints_the_figures(
    through_runtime: bool,
    patch_file: Path,
    held_out: Path,
    tiny_llama: Path,
    tiny_llama_export: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "evaluate",
        str(tiny_llama),
        str(patch_file),
        "--prompt",
        CONTEXT,
        "--queries",
        str(held_out),
        "--json",
    ]
    if through_runtime:
        arguments += ["--runtime", str(tiny_llama_export)]
    assert cli.main([*arguments, "--max-new-tokens", "6"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"kl_unpatched", "kl_patched", "gap_closed", "top1_agreement", "completion_tokens"} <= set(figures)
    assert figures["kl_unpatched"] > 0 and figures["kl_patched"] > 0
    assert figures["gap_closed"] == pytest.approx(1 - figures["kl_patched"] / figures["kl_unpatched"], abs=1e-4)
    assert figures["queries"] == 2 and 2 <= figures["completion_tokens"] <= 12


def test_torch_and_the_runtime_give_the_same_figures(
    patch_file: Path, held_out: Path, tiny_llama: Path, tiny_llama_export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["evaluate", str(tiny_llama), str(patch_file), "--prompt", CONTEXT, "--queries", str(held_out), "--json"]
    cli.main([*common, "--max-new-tokens", "6"])
    in_torch = json.loads(capsys.readouterr().out)
    cli.main([*common, "--max-new-tokens", "6", "--runtime", str(tiny_llama_export)])
    in_runtime = json.loads(capsys.readouterr().out)
    assert in_runtime["kl_patched"] == pytest.approx(in_torch["kl_patched"], rel=1e-3)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Assert that the command exits with 2 and prints nothing on stdout; returns its stderr."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": "   "}, "prompt"),
        ({"prompt": "very long " * 200}, "prompt"),
        ({"rank": 0}, "--rank"),
        ({"limit": 0}, "--limit"),
        ({"holdout": -1}, "--holdout"),
        ({"ridge": "nan"}, "--ridge"),
        ({"max-new-tokens": 0}, "--max-new-tokens"),
        ({"device": "tpu"}, "--device"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    changes: dict[str, Any], field: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(patch_arguments(tiny_llama, tmp_path / "p.safetensors", **changes), capsys)
    assert field in message and "got" in message
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_queries_is_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "none.txt"
    empty.write_text("# nothing\n\n")
    message = refused(patch_arguments(tiny_llama, tmp_path / "p.safetensors", queries=empty), capsys)
    assert "holds no query" in message


def test_held_out_queries_that_are_fitted_are_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries, same = tmp_path / "q.txt", tmp_path / "h.txt"
    queries.write_text("What is tea?\nWhat is salt?\n")
    same.write_text("what is  TEA?\n")
    arguments = [*patch_arguments(tiny_llama, tmp_path / "p.safetensors", queries=queries), f"--held-out={same}"]
    assert "held-out queries are also among the fitted ones" in refused(arguments, capsys)


def test_evaluating_on_fitted_queries_is_refused(
    patch_file: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tp_export.queries import split_holdout

    fitted, _ = split_holdout(load_questions(None)[:8], 2, 0)
    file = tmp_path / "fitted.txt"
    file.write_text(fitted[0].upper() + "\nWhat else?\n")
    arguments = ["evaluate", str(tiny_llama), str(patch_file), "--prompt", CONTEXT, "--queries", str(file)]
    assert "held-out queries are also among the fitted ones" in refused(arguments, capsys)


def test_evaluating_on_another_base_is_refused(
    patch_file: Path, held_out: Path, tiny_gemma: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", str(tiny_gemma), str(patch_file), "--prompt", CONTEXT, "--queries", str(held_out)]
    assert "another base" in refused(arguments, capsys)


def test_a_fit_whose_completions_are_all_empty_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dialogues, "complete", lambda _model, prompts, *_args, **_kw: [(2,)] * len(prompts))
    message = refused(patch_arguments(tiny_llama, tmp_path / "p.safetensors"), capsys)
    assert "every completion is empty" in message


def test_an_interrupted_fit_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_args: Any, **_kw: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(closed_form, "fit_lockstep", interrupted)
    assert cli.main(patch_arguments(tiny_llama, tmp_path / "p.safetensors")) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_file(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.safetensors"
    random_patch().save(out)
    before = out.read_bytes()

    def full(*_args: Any, **_kw: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tp_runtime.storage.atomic._flush", full)
    assert cli.main(patch_arguments(tiny_llama, out)) == 1
    assert "No space left" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]
    assert out.read_bytes() == before


def test_a_search_fits_its_choice_again_on_the_queries_that_it_chose_by(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[tuple[int, Recipe]] = []

    def recorded(model: Any, rows: Calibration, recipe: Recipe, *others: Any) -> Any:
        fitted.append((len(rows.dialogues), recipe))
        return closed_form.fit_patch(model, rows, recipe, *others)

    monkeypatch.setattr(make, "fit_patch", recorded)
    out = tmp_path / "p.safetensors"
    options = {"rank": None, "limit": 20, "samples": 1, "max-new-tokens": 3, "target": "0.01"}
    assert cli.main([*patch_arguments(tiny_llama, out, **options), "--no-restating"]) == 0
    assert {count for count, _recipe in fitted[:-1]} == {12}  # 8 of the 20 queries are kept for the choice
    assert fitted[-1][0] == 20
    assert fitted[-1][1] in [recipe for _count, recipe in fitted[:-1]]
    config = Patch.load(out).config
    assert config.calibration is not None and config.calibration["queries"] == 20
    assert config.fidelity is not None and config.fidelity["queries"] == 2  # the held-out ones


@pytest.mark.parametrize(("restating", "least", "forward"), [(True, 4, True), (True, 5, False), (False, 4, False)])
def test_enough_entries_of_a_context_that_is_restated_are_selected_one_after_another(
    restating: bool, least: int, forward: bool, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Behind] = []

    def recorded(*args: Any, behind: Behind, **options: Any) -> Any:
        found.append(behind)
        return fit_lockstep(*args, behind=behind, **options)

    monkeypatch.setattr(closed_form, "fit_lockstep", recorded)
    monkeypatch.setattr(calibration, "RESTATED_CONTEXT", 1)
    monkeypatch.setattr(closed_form, "LEAST_FORWARD", least)
    options = patch_arguments(tiny_llama, tmp_path / "p.safetensors", rank=None, prefix=4, samples=1)
    queries = tmp_path / "q.txt"
    queries.write_text("".join(f"What is {i}?\n" for i in range(8)))
    assert cli.main([*options, f"--queries={queries}", *([] if restating else ["--no-restating"])]) == 0
    compaction = found[0].compaction
    assert compaction is not None
    assert (compaction.forward, compaction.answer_weight) == (forward, 1.0 if restating else 5.0)


def test_the_queries_of_a_fit_are_saved_for_the_report(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tp_export.queries.write_questions", lambda *_args, **_kw: ["Where is the sea?", "# Ahoy?"])
    monkeypatch.setattr("tp_export.fit.LONG_CONTEXT", 1)
    out, queries = tmp_path / "p.safetensors", tmp_path / "q.jsonl"
    arguments = patch_arguments(tiny_llama, out, rank=None, prefix=4, samples=1)
    assert cli.main(arguments) == 0
    assert "the model wrote 2 of the 6 queries; --save-queries" in capsys.readouterr().err
    assert cli.main([*arguments, f"--save-queries={queries}"]) == 0
    assert "--save-queries" not in capsys.readouterr().err
    saved = load_questions(queries)
    assert saved[:2] == ["Where is the sea?", "# Ahoy?"] and len(saved) == 6
    assert fitted_queries(Patch.load(out), saved) == saved
    assert "already exists" in refused([*arguments, f"--save-queries={queries}"], capsys)
    assert ".jsonl" in refused([*arguments, f"--save-queries={tmp_path / 'q.txt'}"], capsys)


def test_truncated_and_missing_sources_are_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    assert "no such folder" in refused(["model", str(tmp_path / "nowhere"), str(tmp_path / "out")], capsys)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    message = refused(["model", str(broken), str(tmp_path / "out")], capsys)
    assert "truncated" in message and "bytes" in message
    assert not (tmp_path / "out").exists()
