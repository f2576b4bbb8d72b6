"""`tp-export patch --prompts`: a patch for every prompt of a folder, resumed where it stopped, in turn or on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tp_export.cli import main
from tp_runtime.patch import Patch

FEW = ("--limit", "3", "--holdout", "2", "--max-new-tokens", "4", "--samples", "1", "--method", "vector")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    prompts.mkdir()
    out.mkdir()
    for name in ("ada", "bob"):
        (prompts / f"{name}.txt").write_text(f"You are {name}.\n")
    (prompts / "bob.queries.jsonl").write_text("".join(f'{{"query": "What is {n}?"}}\n' for n in range(5)))
    return prompts, out


def fit(model: Path, folders: tuple[Path, Path], *more: str) -> int:
    prompts, out = folders
    return main(["patch", str(model), str(out), "--prompts", str(prompts), *FEW, *more])


def test_every_prompt_gets_its_patch(tiny_llama: Path, folders: tuple[Path, Path], capsys: Any) -> None:
    assert fit(tiny_llama, folders) == 0
    out = folders[1]
    assert capsys.readouterr().out.splitlines() == [str(out / "ada.safetensors"), str(out / "bob.safetensors")]
    assert [Patch.load(out / f"{name}.safetensors").name for name in ("ada", "bob")] == ["ada", "bob"]


def test_a_run_goes_on_where_it_stopped(tiny_llama: Path, folders: tuple[Path, Path], capsys: Any) -> None:
    prompts, out = folders
    fit(tiny_llama, folders)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (prompts / "ada.txt").write_text("You are another.\n")
    capsys.readouterr()
    assert fit(tiny_llama, folders) == 0
    assert "note: 1 of 2 patches are there already" in capsys.readouterr().err
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert after["bob.safetensors"] == before["bob.safetensors"]
    assert after["ada.safetensors"] != before["ada.safetensors"]


def test_a_prompt_that_fails_does_not_stop_the_others(
    tiny_llama: Path, folders: tuple[Path, Path], capsys: Any
) -> None:
    (folders[0] / "ada.txt").write_text(" \n")
    assert fit(tiny_llama, folders) == 2
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [str(folders[1] / "bob.safetensors")]
    assert "error: ada: " in shown.err and not (folders[1] / "ada.safetensors").exists()


def test_ray_fits_the_same_patches(tiny_llama: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert fit(tiny_llama, folders) == 0
    alone = [Patch.load(path).identity for path in sorted(folders[1].iterdir())]
    (tmp_path / "ray").mkdir()
    assert fit(tiny_llama, (folders[0], tmp_path / "ray"), "--ray") == 0
    assert [Patch.load(path).identity for path in sorted((tmp_path / "ray").iterdir())] == alone


@pytest.mark.parametrize(
    ("more", "field"),
    [
        (["--prompt", "x"], "--prompt"),
        (["--name", "x"], "--name"),
        (["--rollouts", "x.jsonl"], "--rollouts"),
    ],
)
def test_options_of_one_patch_are_refused(
    tiny_llama: Path, folders: tuple[Path, Path], capsys: Any, more: list[str], field: str
) -> None:
    assert fit(tiny_llama, folders, *more) == 2
    assert f"error: {field}: " in capsys.readouterr().err


def test_ray_without_prompts_and_folders_without_prompts_are_refused(
    tiny_llama: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(["patch", str(tiny_llama), str(tmp_path / "x.safetensors"), "--prompt", "x", "--ray"]) == 2
    assert "--ray: Ray fits many patches" in capsys.readouterr().err
    assert main(["patch", str(tiny_llama), str(tmp_path), "--prompts", str(tmp_path)]) == 2
    assert "--prompts: the folder holds no prompts" in capsys.readouterr().err
