"""How a folder says that its graph also returns the largest logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.folders import alter, describe, fill
from tp_runtime.errors import ModelFormatError
from tp_runtime.session import Graph, ModelFolder, write_slots_file


def test_a_folder_keeps_the_number_of_largest_logits_and_other_folders_do_not_mention_it(tmp_path: Path) -> None:
    path = fill(tmp_path / "model")
    assert "best" not in json.loads((path / "patch_slots.json").read_text())
    assert ModelFolder.open(path).best is None
    write_slots_file(describe(path, best=16))
    assert ModelFolder.open(path).best == 16


@pytest.mark.parametrize("value", [None, 0, -1, 65, 16.0, True, "16", [16]])
def test_a_number_of_another_form_is_refused(value: Any, tmp_path: Path) -> None:
    path = fill(tmp_path / "model")  # its vocabulary has 64 ids
    alter(path, lambda data: data.update(best=value))
    with pytest.raises(ModelFormatError, match="best"):
        ModelFolder.open(path)


def test_largest_logits_of_the_route_optimum_are_refused(tmp_path: Path) -> None:
    path = fill(tmp_path / "model")
    with pytest.raises(ModelFormatError, match="only graphs of the route fused"):
        write_slots_file(describe(path, best=16, route="optimum"))


def test_a_graph_that_does_not_return_what_the_folder_says_is_refused(tiny_llama_export: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_llama_export, path)
    alter(path, lambda data: data.update(best=16))
    with pytest.raises(ModelFormatError, match=r"no output tp\.best_values"):
        Graph(ModelFolder.open(path), "cpu")
