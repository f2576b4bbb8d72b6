"""The committed fixtures are intact, and on this machine they reproduce the figures that torch computed for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime_tests.committed import FIXTURES, GRAPHS, VERSIONS, digests, figure_patch, torch_figures
from tp_runtime.session import Graph, ModelFolder
from tp_runtime.session.description import SLOTS_FILE
from tp_runtime.storage import sha256_file

FOLDERS = sorted(torch_figures())
# The largest allowed difference of a logit. Kernels of quantised graphs also round activations, and torch does not.
CLOSE = {"fp32": 1e-4, "int8": 0.1, "int4-rtn": 0.1}


def test_the_digests_list_exactly_the_fixtures() -> None:
    found = [FIXTURES / name / SLOTS_FILE for name in FOLDERS] + list(GRAPHS.iterdir()) + list(VERSIONS.iterdir())
    assert digests() == {file.relative_to(FIXTURES).as_posix(): sha256_file(file) for file in found}
    assert {path.name for path in FIXTURES.iterdir() if path.is_dir()} == {*FOLDERS, GRAPHS.name, VERSIONS.name}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_contains_exactly_the_files_it_lists(name: str) -> None:
    assert ModelFolder.open(FIXTURES / name, verify=True).unlisted == ()


def test_fixtures_are_small() -> None:
    sizes = [file.stat().st_size for file in FIXTURES.rglob("*") if file.is_file()]
    assert max(sizes) < 2**20 and sum(sizes) < 3 * 2**20


@pytest.mark.parametrize("patched", [False, True], ids=["default", "patched"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_reproduces_the_figures_of_torch(name: str, patched: bool) -> None:
    figures = torch_figures()[name]["patched" if patched else "default"]
    graph = Graph(ModelFolder.open(FIXTURES / name), "cpu")
    bound = graph.bind(figure_patch(graph.folder)) if patched else graph.default
    logits = graph.run(figures["token_ids"], bound)
    assert furthest_figure(logits, figures) < CLOSE[graph.folder.precision]


def furthest_figure(logits: Any, figures: dict[str, list[Any]]) -> float:
    """Return the largest difference between the logits' figures and the given ones."""
    at_top1 = logits[np.arange(len(logits)), figures["top1"]]
    logsumexp = np.log(np.exp(logits.astype(np.float64)).sum(1))
    return float(max(np.abs(at_top1 - figures["top1_logits"]).max(), np.abs(logsumexp - figures["logsumexp"]).max()))
