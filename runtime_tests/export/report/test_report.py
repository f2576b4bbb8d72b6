"""The command `tp-export report`: what it writes, prints and stores in the patch file, and which input it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tp_export.cli import main as tp_export_main
from tp_export.queries import load_questions
from tp_export.report import store_summary
from tp_export.report.figures import Report
from tp_runtime.patch import Patch

from .conftest import FRENCH, PIRATE, QUERIES


def arguments(source: Path, patches: list[Path], held_out: Path, out: Path, *more: str) -> list[str]:
    return [
        *("report", str(source), *map(str, patches), "--prompt", PIRATE, "--queries", str(held_out)),
        *("-o", str(out), "--max-new-tokens", "6", "--long", "8", *more),
    ]


# -- the summary in the file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "i8"])
def test_the_summary_is_stored_and_nothing_else_changes(
    dtype: str, report: Report, files: list[Path], tmp_path: Path, cli: Any
) -> None:
    file = tmp_path / "p.safetensors"
    Patch.load(files[0]).save(file, dtype)
    before, size = Patch.load(file), file.stat().st_size
    store_summary(file, before, report.patches[0])
    after = Patch.load(file)
    assert after.identity == before.identity and after.config.probe == before.config.probe
    assert file.stat().st_size - size < 2000
    assert after.config.report is not None and after.config.report["queries"] == len(QUERIES)
    assert {"gap_closed", "unrelated_text_kl", "ends_turn", "gap_closed_turn_3"} <= set(after.config.report)
    beside = {"gap_closed_se", "gap_closed_first", "gap_closed_first_se", "top1_agreement", "top1_agreement_first"}
    assert beside <= set(after.config.report)
    assert (0.5 * after).config.report is None and after.truncate(2).config.report is None
    assert f"gap_closed {after.config.report['gap_closed']:.4g}" in cli("inspect", file).out
    assert cli("inspect", file, "--json").json["report"] == after.config.report


def test_the_command_writes_prints_and_stores(
    files: list[Path], held_out: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = Path(shutil.copy(files[0], tmp_path / "p.safetensors")), tmp_path / "r.html"
    more = ("--baselines", "none", "--long", "0", "--store", "--json")
    assert tp_export_main(arguments(tiny_llama, [file], held_out, out, *more)) == 0
    figures = json.loads(capsys.readouterr().out)
    assert "--runtime)" in out.read_text() and figures["runtime"] is None
    stored = Patch.load(file)
    assert stored.config.report is not None and stored.identity == figures["patches"][0]["identity"]
    assert stored.config.report["gap_closed"] == pytest.approx(
        figures["patches"][0]["variants"][3]["held_out"]["gap_closed"], abs=1e-5
    )
    assert "ends_turn" not in stored.config.report and "first_token_ms" not in stored.config.report


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "field"),
    [
        (["--prompt", FRENCH], "--prompt"),
        (["--queries", "HELD", "--queries", "HELD"], "--queries"),
        (["--baselines", "output,magic"], "--baselines"),
        (["--long", "-1"], "--long"),
        (["--frontier", "4,x"], "--frontier"),
        (["--frontier-ranks", "0"], "--frontier-ranks"),
        (["--stop", ""], "--stop"),
        (["--long", "100000"], "--long"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["-o", "nowhere/r.html"], "-o"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    more: list[str], field: str, files: list[Path], held_out: Path, tiny_llama: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "r.html"
    more = [str(held_out) if word == "HELD" else word for word in more]
    assert tp_export_main(arguments(tiny_llama, files[:1], held_out, out, *more)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and f"error: {field}: " in captured.err and "got" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_fitted_queries_and_a_repeated_patch_are_refused(
    files: list[Path], held_out: Path, tiny_llama: Path, tmp_path: Path, capsys: Any
) -> None:
    fitted = tmp_path / "fitted.txt"
    fitted.write_text(load_questions(None)[0])
    assert tp_export_main(arguments(tiny_llama, files[:1], fitted, tmp_path / "r.html")) == 2
    assert "held-out queries are also among the fitted ones" in capsys.readouterr().err
    copy = shutil.copy(files[0], tmp_path / "copy.safetensors")
    both = arguments(tiny_llama, [files[0], Path(copy)], held_out, tmp_path / "r.html", "--prompt", FRENCH)
    assert tp_export_main(both) == 2
    assert "the same patch is given twice" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_a_missing_plotting_library_is_an_error_with_the_fix(
    files: list[Path], held_out: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert tp_export_main(arguments(tiny_llama, files[:1], held_out, tmp_path / "r.html")) == 1
    assert "pip install 'tp-runtime[export,report]'" in capsys.readouterr().err
