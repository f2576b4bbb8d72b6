"""The committed fixtures of the edge tests equal the exporter's current output.

The digests of weights are not compared, because random numbers may differ in the last bit between processors. After an
intended change, run `python -m runtime_tests.export.fixtures` to write the fixtures again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from runtime_tests.committed import FIXTURES, GRAPHS, torch_figures
from runtime_tests.export import fixtures
from tp_export.source import Source, open_source
from tp_runtime.patch import Patch
from tp_runtime.session import DEFAULT_FILE

CLOSE = 1e-5


@pytest.fixture(scope="module")
def sources(tiny_llama: Path, tiny_gemma: Path) -> dict[str, Source]:
    return {"tiny-llama": open_source(tiny_llama), "tiny-gemma": open_source(tiny_gemma)}


@pytest.fixture(scope="module")
def remade(
    sources: dict[str, Source], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A function that exports a fixture again, once, given its name; two of the exports are shared with other tests."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("remade")

    def make(name: str) -> Path:
        if name not in made:
            if name in sources:
                made[name] = request.getfixturevalue(f"{name.replace('-', '_')}_export")
            else:
                made[name] = fixtures.make_folder(name, sources[fixtures.FOLDERS[name][0]], root / name)
        return made[name]

    return make


def without_digests(value: Any) -> Any:
    return re.sub(r"\b[0-9a-f]{64}\b", "a digest", json.dumps(value))


def contents(graph: Path) -> tuple[str, dict[str, Any]]:
    """Return a graph as text without the values of its tensors, and the values by name."""
    model = onnx.load(graph)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        tensors |= {f"{node.name} {a.name}": a.t for a in node.attribute if a.type == onnx.AttributeProto.TENSOR}
    values = {name: numpy_helper.to_array(tensor) for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
    return str(model), values


def assert_same_graph(committed: Path, remade: Path) -> None:
    (text, values), (text_now, values_now) = contents(committed), contents(remade)
    assert text == text_now
    for name, value in values.items():
        now = values_now[name]
        assert (value.shape, value.dtype) == (now.shape, now.dtype), name
        if value.dtype == np.uint8:  # packed codes of quantised weights, which a difference in the last bit may change
            assert np.mean(value != now) < 0.01, name
        else:
            assert np.allclose(value, now, rtol=0, atol=CLOSE), name


@pytest.mark.parametrize("name", fixtures.FOLDERS)
def test_a_committed_folder_equals_a_new_export(name: str, remade: Callable[[str], Path]) -> None:
    committed, now = FIXTURES / name, remade(name)
    assert {file.name for file in committed.iterdir()} == {file.name for file in now.iterdir()}
    assert_same_graph(committed / "model.onnx", now / "model.onnx")
    for file in committed.glob("*.json"):
        parsed, parsed_now = (json.loads((folder / file.name).read_text()) for folder in (committed, now))
        assert without_digests(parsed) == without_digests(parsed_now), file.name
    if (committed / DEFAULT_FILE).exists():
        patch, patch_now = (Patch.load(folder / DEFAULT_FILE) for folder in (committed, now))
        assert replace(patch.config, base_digest="0" * 64) == replace(patch_now.config, base_digest="0" * 64)
        assert patch.deltas.keys() == patch_now.deltas.keys()
        for slot, delta in patch.deltas.items():
            for part in ("a", "b", "bias", "mean"):
                one, other = getattr(delta, part), getattr(patch_now.deltas[slot], part)
                assert one is other is None or np.allclose(one, other, rtol=0, atol=CLOSE), (slot, part)


@pytest.mark.parametrize("name", fixtures.FOLDERS)
def test_committed_figures_equal_those_of_torch(
    name: str, remade: Callable[[str], Path], sources: dict[str, Source]
) -> None:
    now = fixtures.torch_figures(sources[fixtures.FOLDERS[name][0]], remade(name))
    for variant, figures in torch_figures()[name].items():
        for key, numbers in figures.items():
            assert np.allclose(numbers, now[variant][key], rtol=0, atol=1e-3), (variant, key)


def test_committed_small_graphs_equal_new_ones(tmp_path: Path) -> None:
    now = fixtures.make_graphs(tmp_path / "graphs")
    assert {file.name for file in GRAPHS.iterdir()} == {file.name for file in now.iterdir()}
    for file in GRAPHS.iterdir():
        assert_same_graph(file, now / file.name)
