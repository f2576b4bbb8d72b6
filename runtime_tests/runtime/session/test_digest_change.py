"""A base whose digest was another one in earlier versions: the folder says so, and so does the refusal of a patch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.cli import Cli
from runtime_tests.folders import BASE_DIGEST, alter, describe, fill
from runtime_tests.patches import random_config, random_patch
from tp_runtime.errors import BaseMismatchError, ModelFormatError
from tp_runtime.session import DigestChange, ModelFolder, check_base, write_slots_file

CHANGE = DigestChange("c" * 64, "it covered files that are not loaded: other.safetensors")


def test_a_folder_keeps_the_change_and_other_folders_do_not_mention_one(tmp_path: Path) -> None:
    path = fill(tmp_path / "model")
    assert "digest_change" not in json.loads((path / "patch_slots.json").read_text())
    assert ModelFolder.open(path).digest_change is None
    write_slots_file(describe(path, digest_change=CHANGE))
    assert ModelFolder.open(path).digest_change == CHANGE


@pytest.mark.parametrize(
    "value",
    [
        None,
        "c" * 64,
        {"before": "c" * 64},
        {"before": "c" * 63, "reason": "it did"},
        {"before": "c" * 64, "reason": "two\nlines"},
        {"before": "c" * 64, "reason": ""},
        {"before": "c" * 64, "reason": "it did", "after": "d" * 64},
    ],
)
def test_a_change_of_another_form_is_refused(value: Any, tmp_path: Path) -> None:
    path = fill(tmp_path / "model")
    alter(path, lambda data: data.update(digest_change=value))
    with pytest.raises(ModelFormatError, match="digest_change"):
        ModelFolder.open(path)


def test_a_patch_of_the_earlier_digest_is_refused_with_the_reason_and_others_as_before() -> None:
    patch = random_patch(config=random_config(base_digest=CHANGE.before))
    with pytest.raises(BaseMismatchError, match=r"because it covered files .* Fix: fit the patch again"):
        check_base(patch, "tests/tiny", BASE_DIGEST, "fp32", CHANGE)
    check_base(random_patch(config=random_config(base_digest=BASE_DIGEST)), "tests/tiny", BASE_DIGEST, "fp32", CHANGE)
    with pytest.raises(BaseMismatchError, match="was fitted on another base model"):
        check_base(random_patch(config=random_config(base_digest="d" * 64)), "tests/tiny", BASE_DIGEST, "fp32", CHANGE)


def test_inspect_says_both_digests_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, cli = fill(tmp_path / "model"), Cli(monkeypatch, capsys)
    assert "before this version" not in cli("inspect", path).out
    assert cli("inspect", path, "--json").json["digest_change"] is None
    write_slots_file(describe(path, digest_change=CHANGE))
    shown = cli("inspect", path).out
    assert BASE_DIGEST in shown and f"before this version: {CHANGE.before}, because {CHANGE.reason}" in shown
    assert cli("inspect", path, "--json").json["digest_change"] == {"before": CHANGE.before, "reason": CHANGE.reason}
