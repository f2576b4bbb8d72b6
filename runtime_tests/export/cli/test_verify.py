"""`tp-export verify` on tiny models: its output and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime_tests.export.tiny import tiny_model
from tp_export.cli import main


def test_the_theorem_is_verified_with_only_a_model(tiny_gemma: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command uses five built-in queries; the last line is the last layer, and every error is a rounding error."""
    assert main(["verify", str(tiny_gemma), "--tokens", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "(gemma3_text), float32: 5 queries, 2 tokens each" in lines[0]
    assert lines[1].startswith("tokens agreed    10 of 10 (without a patch ")
    assert [line.split()[0] for line in lines[-3:]] == ["0", "1", "2"]
    assert max(float(line.split()[1]) for line in lines[-3:]) < 1e-4


@pytest.mark.parametrize("design", ["gpt_neox", "mixtral"])
def test_the_json_contains_the_figures(design: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_model(tmp_path / "source", design)
    queries = tmp_path / "queries.txt"
    queries.write_text("Why?\nHow?\n")
    code = main(["verify", str(source), "--prompt", "Be brief.", "--queries", str(queries), "--tokens", "3", "--json"])
    assert code == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["architecture"], report["dtype"], report["queries"], report["tokens"]) == (design, "float32", 2, 6)
    assert report["agreed"] == 6
    assert report["max_logit_error"] < 1e-3 < 1e-2 < report["max_logit_error_unpatched"]
    assert len(report["max_residual_error"]) == 3 and max(report["max_residual_error"]) < 1e-4


@pytest.mark.parametrize("design", ["llama", "gemma3_text"])
def test_most_of_the_difference_disappears_in_bfloat16(
    design: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights with 8 significant bits leave errors of about 1% of the residual stream's scale; float32 leaves less."""
    source = tiny_model(tmp_path / "source", design, sliding_window=64)
    options = ["--prompt", "Be brief.", "--tokens", "3", "--dtype", "bfloat16", "--json"]
    assert main(["verify", str(source), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dtype"] == "bfloat16"
    assert 1e-4 < max(report["max_residual_error"]) < 0.1
    assert report["max_logit_error"] < 0.2 * report["max_logit_error_unpatched"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--tokens", "0"], "--tokens"),
        (["--prompt", "  "], "--prompt"),
        (["--tokens", "600"], "context window"),
        (["--device", "abacus"], "--device"),
    ],
)
def test_bad_input_is_refused_before_the_verification(
    tiny_llama: Path, options: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tiny_llama), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and field in captured.err.splitlines()[-1]
