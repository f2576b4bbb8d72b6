"""The `--patch` option: files, strengths and sums."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from runtime_tests.patches import random_config, random_patch
from tp_runtime.cli import main
from tp_runtime.cli.options import read_patches, split_spec
from tp_runtime.errors import BaseMismatchError, PatchFormatError, PatchTargetError, PatchValueError
from tp_runtime.model import ACTIVE
from tp_runtime.patch import Patch


@pytest.mark.parametrize(
    ("command", "captures"), [("generate", True), ("chat", True), ("absorb", False), ("serve", False)]
)
def test_only_commands_that_decode_single_sequences_capture_steps(
    command: str, captures: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert ("--cuda-graphs" in capsys.readouterr().out) is captures


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    random_patch(1, config=random_config(name="one")).save(one)
    random_patch(2, config=random_config(name="two")).save(two)
    return one, two


@pytest.mark.parametrize(
    ("spec", "strength"), [("@0.5", 0.5), ("@-2", -2.0), ("@1e-3", 0.001), ("@0", 0.0), ("", 1.0), ("@inf", math.inf)]
)
def test_a_strength_follows_the_last_at(files: tuple[Path, Path], spec: str, strength: float) -> None:
    assert split_spec(f"{files[0]}{spec}") == (str(files[0]), strength)


def test_a_file_with_an_at_in_its_name_is_found(files: tuple[Path, Path]) -> None:
    odd = files[0].rename(files[0].with_name("tuned@2"))
    assert split_spec(str(odd)) == (str(odd), 1.0)
    assert split_spec(f"{odd}@0.5") == (str(odd), 0.5)


def test_an_at_that_no_number_follows_belongs_to_the_name() -> None:
    assert split_spec("me@home/patch.safetensors") == ("me@home/patch.safetensors", 1.0)
    assert split_spec("nowhere@2") == ("nowhere", 2.0)


@pytest.mark.parametrize("factor", ["", "x", "0,5", "1/2"])
def test_text_after_the_at_of_a_file_must_be_a_number(files: tuple[Path, Path], factor: str) -> None:
    with pytest.raises(PatchValueError, match="the value is not a valid strength"):
        read_patches([f"{files[0]}@{factor}"])


@pytest.mark.parametrize("factor", ["nan", "inf", "-inf", "1e999", "1e-99"])
def test_a_strength_must_be_finite(files: tuple[Path, Path], factor: str) -> None:
    with pytest.raises(PatchValueError, match="the value is not a valid strength"):
        read_patches([f"{files[0]}@{factor}"])


def test_several_patches_are_added(files: tuple[Path, Path]) -> None:
    chosen = read_patches([f"{files[0]}@0.5", f"{files[1]}@-1", str(files[0])])
    one, two = map(Patch.load, files)
    assert isinstance(chosen.choice, Patch)
    assert chosen.choice.terms == (0.5 * one - two + one).terms
    assert [(part.name, part.identity, part.strength) for part in chosen.parts] == [
        ("one", one.identity, 0.5),
        ("two", two.identity, -1.0),
        ("one", one.identity, 1.0),
    ]


def test_strength_zero_is_the_base(files: tuple[Path, Path]) -> None:
    chosen = read_patches([f"{files[0]}@0"])
    assert isinstance(chosen.choice, Patch)
    assert chosen.choice.terms == ()


def test_no_patch_is_the_folders_default_and_none_is_the_base() -> None:
    assert read_patches([]).choice is ACTIVE
    assert read_patches(["none"]).choice is None


def test_none_cannot_be_added_to_a_patch(files: tuple[Path, Path]) -> None:
    with pytest.raises(PatchTargetError, match="selects the base model and cannot be added to a patch"):
        read_patches(["none", str(files[0])])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchFormatError, match="no such file"):
        read_patches([f"{tmp_path / 'nothing'}@2"])


def test_patches_of_different_bases_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    random_patch(3, config=random_config(base_digest="f" * 64)).save(other)
    with pytest.raises(BaseMismatchError):
        read_patches([str(files[0]), str(other)])
