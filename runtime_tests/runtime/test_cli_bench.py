"""`tp-runtime bench`: that it measures what it says; not how fast anything is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from runtime_tests.cli import Cli
from runtime_tests.patches import patch_for, random_config, random_patch
from tp_runtime.cli import bench
from tp_runtime.folder import ModelFolder

QUICK = ("--tokens", "3", "--prompt-tokens", "5", "--rounds", "2", "--device", "cpu")


def test_a_random_patch_by_default(cli: Cli, tiny_llama_export: Path) -> None:
    result = cli("bench", tiny_llama_export, *QUICK, "--json")
    report = result.json
    assert result.code == 0
    assert (report["patch"], report["patch_file"], report["patch_rank"]) == ("random", None, 16)
    assert report["patch_inputs"] == 3 * report["patch_slots"]
    for name in ("model_load_s", "patch_load_ms", "switch_ms", "switch_first_step_ms", "patch_bytes", "token_ratio"):
        assert report[name] > 0
    for name in ("first_token", "token"):
        times = report[f"{name}_ms"]
        assert min(times.values()) > 0
        assert report[f"{name}_ratio"] == pytest.approx(times["patched"] / times["unpatched"])
        assert math.isfinite(report[f"{name}_ratio_per_round"])
    assert (report["rounds"], report["tokens"], report["prompt_tokens"]) == (2, 3, 5)
    assert set(report["versions"]) == {"tp-runtime", "numpy", "onnxruntime", "python"}


def test_a_table_for_people(cli: Cli, tiny_llama_export: Path, tmp_path: Path) -> None:
    file = tmp_path / "patch.safetensors"
    folder = ModelFolder.open(tiny_llama_export)
    patch_for(folder, rank=5).save(file)
    result = cli("bench", tiny_llama_export, *QUICK, "--patch", file)
    assert f"random-0, rank 5 in {len(folder.slots)} slots" in result.out
    assert "made for this run" not in result.out
    for label in ("first token", "each further token", "load a patch", "switch", "medians of 2 rounds"):
        assert label in result.out


def test_the_two_arms_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def steps(_graph: object, _prompt: object, bound: str, **_: object) -> object:
        for _ in range(4):
            order.append(bound)
            yield 0

    monkeypatch.setattr(bench.engine, "generate", steps)
    measured = bench._round(None, [1], ("base", "patch"), 3, first=1)  # type: ignore[arg-type]
    assert order == ["patch", "base", "base", "patch"] * 2
    assert [len(steps) for steps in measured.steps] == [3, 3]
    assert min(measured.first) > 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--tokens", "1"], "tokens"),
        (["--rounds", "0"], "rounds"),
        (["--prompt-tokens", "0"], "prompt_tokens"),
        (["--prompt-tokens", "1000000"], "context window"),
        (["--patch", "nothing"], "no such file"),
    ],
)
def test_numbers_that_cannot_be(cli: Cli, tiny_llama_export: Path, args: list[str], said: str) -> None:
    result = cli("bench", tiny_llama_export, "--device", "cpu", *args)
    assert (result.code, result.out) == (2, "")
    assert said in result.err


def test_a_patch_that_does_not_fit(cli: Cli, tiny_llama_export: Path, tmp_path: Path) -> None:
    file = tmp_path / "patch.safetensors"
    digest = ModelFolder.open(tiny_llama_export).base_digest
    random_patch(config=random_config(base_digest=digest)).save(file)
    result = cli("bench", tiny_llama_export, *QUICK, "--patch", file)
    assert result.code == 2
    assert "does not fit" in result.err


def test_a_patch_without_effect_is_not_measured(cli: Cli, tiny_llama_export: Path, tmp_path: Path) -> None:
    file = tmp_path / "patch.safetensors"
    patch_for(ModelFolder.open(tiny_llama_export), scale=0.0).save(file)
    result = cli("bench", tiny_llama_export, *QUICK, "--patch", file)
    assert result.code == 2
    assert "changes nothing" in result.err
