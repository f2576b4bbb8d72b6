"""Patches that could be taken for one another: what runs has the identity that its key states, whatever a folder says.

A twin is a patch with the same key and other values. A folder whose description named another patch's identity, and a
patch that was scaled there and back, used to bind a twin.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.folders import alter
from runtime_tests.logits import furthest, graph_logits, token_ids
from runtime_tests.patches import patch_for
from tp_runtime.errors import BaseMismatchError, ModelFormatError, PatchError
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.session import DEFAULT_FILE, Graph, ModelFolder, open_session
from tp_runtime.session.device import CUDA, Device

IDS = token_ids(30)


@pytest.fixture
def copy(tiny_llama_patched: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama_patched, tmp_path / "m")


@pytest.fixture(scope="module")
def plain(tiny_llama_export: Path) -> Graph:
    return Graph(ModelFolder.open(tiny_llama_export), "cpu")


@pytest.fixture(scope="module")
def other(plain: Graph) -> Patch:
    return patch_for(plain.folder, seed=7, scale=0.3)


def listed(folder: Path, name: str) -> Callable[[dict[str, Any]], None]:
    """Return a change of the description that lists the file as it is now."""
    raw = (folder / name).read_bytes()
    record = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    return lambda data: data["files"].update({name: record})


def claims(identity: str, terms: list[Any]) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["default_patch"].update(identity=identity, terms=terms)


def test_a_description_that_names_another_patchs_identity_is_refused(copy: Path, other: Patch) -> None:
    alter(copy, claims(other.identity, [[other.identity, 1.0]]))
    for patch in ("default", None, other):
        with pytest.raises(ModelFormatError, match="does not hold the folder's default patch"):
            Graph(ModelFolder.open(copy), "cpu", defaults=None if patch in ("default", None) else patch)


def test_a_description_whose_terms_name_another_patch_binds_that_patchs_own_values(
    copy: Path, other: Patch, plain: Graph
) -> None:
    """The identity is true and the terms are not: they cannot be checked, so they select nothing."""
    own = Patch.load(copy / DEFAULT_FILE)
    alter(copy, claims(own.identity, [[other.identity, 1.0], [own.identity, 1.0]]))
    graph = Graph(ModelFolder.open(copy), "cpu")
    for patch in (own, other, other + own):
        bound = graph.bind(patch)
        assert (bound is graph.default) == (patch is own)
        assert furthest(graph_logits(graph, IDS, bound), graph_logits(plain, IDS, plain.bind(patch))) < 1e-5


@pytest.mark.parametrize("terms", [[], [["a" * 64, 1.0]], [["a" * 64, 1]]])
def test_terms_that_contradict_the_identity_are_refused(copy: Path, terms: list[Any]) -> None:
    alter(copy, lambda data: data["default_patch"].update(terms=terms))
    with pytest.raises(ModelFormatError, match=r"default_patch\.terms"):
        ModelFolder.open(copy)


def test_a_file_of_another_patch_runs_as_what_it_is(copy: Path, other: Patch, plain: Graph) -> None:
    """The graph still holds the old values, and the description fits the new file, whose values the session has."""
    old = Patch.load(copy / DEFAULT_FILE)
    other.save(copy / DEFAULT_FILE, "f32")
    alter(copy, listed(copy, DEFAULT_FILE))
    alter(copy, claims(other.identity, [[other.identity, 1.0]]))
    graph = Graph(ModelFolder.open(copy), "cpu")
    assert graph.bind(other) is graph.default and graph.bind(old) is not graph.default
    for patch in (other, old, None):
        assert furthest(graph_logits(graph, IDS, graph.bind(patch)), graph_logits(plain, IDS, plain.bind(patch))) < 1e-5
    assert np.array_equal(graph_logits(graph, IDS), graph_logits(plain, IDS))


def test_a_patched_graph_that_claims_to_be_the_base_runs_as_the_base(copy: Path, plain: Graph) -> None:
    patch = Patch.load(copy / DEFAULT_FILE)
    alter(copy, lambda data: data.update(default_patch=None))
    graph = Graph(ModelFolder.open(copy), "cpu")
    assert graph.default is graph.base and graph.default_patch is None
    for choice in (None, patch):
        got, wanted = (graph_logits(each, IDS, each.bind(choice)) for each in (graph, plain))
        assert furthest(got, wanted) < 1e-5


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda patch: replace(patch, config=replace(patch.config, base_digest="c" * 64)), BaseMismatchError),
        (lambda patch: replace(patch, config=replace(patch.config, precision="int8")), BaseMismatchError),
        (lambda patch: replace(patch, deltas={(9, "mlp_out"): patch.deltas[0, "mlp_out"]}), PatchError),
    ],
)
def test_a_default_patch_that_does_not_fit_the_folder_is_refused(
    copy: Path, change: Callable[[Patch], Patch], error: type[Exception]
) -> None:
    changed = change(Patch.load(copy / DEFAULT_FILE))
    changed.save(copy / DEFAULT_FILE, "f32")
    alter(copy, listed(copy, DEFAULT_FILE))
    alter(copy, claims(changed.identity, [[changed.identity, 1.0]]))
    with pytest.raises(error):
        Graph(ModelFolder.open(copy), "cpu")


def test_a_patch_scaled_there_and_back_binds_the_patch_itself(tiny_llama_export: Path, other: Patch) -> None:
    model = PatchedModel.from_pretrained(tiny_llama_export, "cpu", patch=other)
    plain = PatchedModel.from_pretrained(tiny_llama_export, "cpu")
    there_and_back = 10 * (0.1 * other)
    assert model.graph.bind(there_and_back) is model.graph.default
    for one in (model, plain):
        assert np.array_equal(one.logits(IDS, there_and_back), one.logits(IDS, other))
        assert one.new_cache(there_and_back).key == one.new_cache(other).key


def test_a_patch_that_rounds_differently_has_a_key_of_its_own(plain: Graph, other: Patch) -> None:
    keys = {plain.bind(patch).key for patch in (0.3 * other, (0.1 * 3) * other, 3 * (0.1 * other), other)}
    assert len(keys) == 3


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available")
@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("choice", ["none", "other", "zero"])
def test_off_the_cpu_the_default_patch_is_bound(
    forged: bool, choice: str, copy: Path, other: Patch, plain: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime ignores initializers that are given on another device, and a session without CUDA shows the same.

    The session asks for CUDA, does not get it, and has the graph's own initializers.
    """
    own = Patch.load(copy / DEFAULT_FILE)
    if forged:
        own = 2 * own
        own.save(copy / DEFAULT_FILE, "f32")
        alter(copy, listed(copy, DEFAULT_FILE))
        alter(copy, claims(own.identity, [[own.identity, 1.0]]))
    monkeypatch.setattr(open_session, "select_device", lambda requested: Device(requested, CUDA))
    defaults = {"none": None, "other": other, "zero": 0 * other}[choice]
    graph = Graph(ModelFolder.open(copy), "auto", defaults=defaults)
    assert graph.device.kind == "cpu" and graph.default.values
    wanted = plain.bind(own if defaults is None else defaults)
    assert furthest(graph_logits(graph, IDS, graph.default), graph_logits(plain, IDS, wanted)) < 1e-5
    for patch in (own, other, 0.5 * other, None):
        got = graph_logits(graph, IDS, graph.bind(patch))
        assert furthest(got, graph_logits(plain, IDS, plain.bind(patch))) < 1e-5


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available")
def test_off_the_cpu_a_plain_folder_takes_a_default_patch(
    tiny_llama_export: Path, other: Patch, plain: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_session, "select_device", lambda requested: Device(requested, CUDA))
    folder = ModelFolder.open(tiny_llama_export)
    assert not Graph(folder, "auto").default.values  # the base needs no binding
    graph = Graph(folder, "auto", defaults=other)
    assert furthest(graph_logits(graph, IDS, graph.default), graph_logits(plain, IDS, plain.bind(other))) < 1e-5
    assert furthest(graph_logits(graph, IDS, graph.base), graph_logits(plain, IDS)) < 1e-5


def test_a_folder_exported_with_a_scaled_patch_is_found_by_its_values(copy: Path, other: Patch) -> None:
    scaled = 0.5 * other
    scaled.save(copy / DEFAULT_FILE, "f32")
    alter(copy, listed(copy, DEFAULT_FILE))
    alter(copy, claims(scaled.identity, [[other.identity, 0.5]]))
    graph = Graph(ModelFolder.open(copy), "cpu")
    assert graph.bind(0.5 * other) is graph.default and graph.bind(other) is not graph.default
    assert json.loads((copy / "patch_slots.json").read_text())["default_patch"]["terms"] == [[other.identity, 0.5]]
