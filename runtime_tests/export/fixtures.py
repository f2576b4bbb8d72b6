"""This module writes the committed fixtures of the edge tests again: `python -m runtime_tests.export.fixtures`.

Run it after a change of the exporter's output, and commit the new files; test_fixtures.py fails until then.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime_tests.committed import DIGESTS, FIGURES, FIXTURES, GRAPHS, VERSIONS, figure_patch
from runtime_tests.export.tiny import tiny_model
from runtime_tests.export.torch_logits import torch_logits
from runtime_tests.logits import token_ids
from runtime_tests.patches import random_config, random_patch, version_patches
from tp_export.graph import export_model
from tp_export.quantise import QuantisedStudent, quantised
from tp_export.source import Source, load_model, open_source
from tp_runtime.patch import FLOAT_PRECISIONS, Delta, Patch
from tp_runtime.session import DEFAULT_FILE, ModelFolder, measure_probe
from tp_runtime.session.description import SLOTS_FILE
from tp_runtime.storage import sha256_file

IDS = token_ids(24)  # the ids of the figures that torch computes; longer than the sliding window

SOURCES: dict[str, dict[str, Any]] = {
    "tiny-llama": {"design": "llama"},
    "tiny-gemma": {"design": "gemma3_text", "chat": False},
}
# Each model folder's source and export options, by the name of the folder.
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-llama": ("tiny-llama", {}),
    "tiny-llama-optimum": ("tiny-llama", {"route": "optimum"}),
    "tiny-llama-patched": ("tiny-llama", {}),
    "tiny-llama-int8": ("tiny-llama", {"precision": "int8"}),
    "tiny-llama-int4": ("tiny-llama", {"precision": "int4-rtn"}),
    "tiny-llama-repaired": ("tiny-llama", {"precision": "int4-rtn", "repair": True}),
    "tiny-gemma": ("tiny-gemma", {"slot_set": "all"}),
}


def make_source(name: str, parent: Path) -> Path:
    """Write one of SOURCES to `parent`: a tiny random model, with the name that its exports state as their base."""
    return tiny_model(parent / name, **SOURCES[name])


def make_folder(name: str, source: Source, out: Path) -> Path:
    """Export `source` to `out` with the options in FOLDERS."""
    options = FOLDERS[name][1]
    if name == "tiny-llama-patched":
        options = {**options, "patch": default_patch(source)}
    # A fitted repair would differ between processors by more than the last bit, so a random one replaces it.
    with mock.patch("tp_export.graph.export.repair_patch", lambda source, *_rest: repair(source)):
        return export_model(source, out, **options)


def default_patch(source: Source) -> Patch:
    """Return a patch with a low-rank pair in layer 0, only a bias in layer 2, and nothing in layer 1."""
    whole = _patch_of_every_layer(source, "random-1", "fp32", scale=0.3)
    bias = whole.deltas[2, "mlp_out"].bias
    return Patch({(0, "mlp_out"): whole.deltas[0, "mlp_out"], (2, "mlp_out"): Delta(bias=bias)}, whole.config)


def repair(source: Source) -> Patch:
    """Return a random patch of every layer that replaces a fitted repair of an int4 base."""
    return _patch_of_every_layer(source, "repair", "int4-rtn", scale=0.1)


def _patch_of_every_layer(source: Source, name: str, precision: str, scale: float) -> Patch:
    config = random_config(
        name=name,
        base_model=source.name,
        base_digest=source.digest,
        architecture=source.architecture,
        precision=precision,
        fidelity=None,
        probe=None,
    )
    sizes = source.config
    return random_patch(
        seed=1,
        layers=sizes["num_hidden_layers"],
        inputs=sizes["intermediate_size"],
        outputs=sizes["hidden_size"],
        scale=scale,
        config=config,
    )


def torch_figures(source: Source, folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Return the figures that torch computes for IDS with the weights of an exported folder.

    `default` has the figures with nothing bound, and `patched` those with `figure_patch`.
    """
    model, opened = load_model(source), ModelFolder.open(folder)
    default = None if opened.default_patch is None else Patch.load(folder / DEFAULT_FILE)
    with ExitStack() as stack:
        if opened.precision not in FLOAT_PRECISIONS:
            stack.enter_context(QuantisedStudent.of(model, quantised(opened.precision)).whole())
        patches = {"default": default, "patched": figure_patch(opened)}
        return {name: measure_probe(IDS, torch_logits(model, IDS, patch)) for name, patch in patches.items()}


# -- small graphs --------------------------------------------------------------------------------------------


def make_graphs(out: Path) -> Path:
    """Write every small graph to the new folder `out`."""
    out.mkdir()
    for name, graph in {"slots": _slots_graph(), "breaks": _breaking_graph()}.items():
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(model)
        onnx.save(model, out / f"{name}.onnx")
    return out


def _slots_graph() -> onnx.GraphProto:
    """Return the graph x + x @ a @ b with overridable rank-0 a and b; an unused initializer causes a warning."""
    a = numpy_helper.from_array(np.zeros((1, 4, 0), np.float32), "tp.0.mlp_out.a")
    b = numpy_helper.from_array(np.zeros((1, 0, 4), np.float32), "tp.0.mlp_out.b")
    unused = numpy_helper.from_array(np.zeros(3, np.float32), "unused")
    nodes = [
        helper.make_node("MatMul", ["x", a.name], ["down"]),
        helper.make_node("MatMul", ["down", b.name], ["delta"]),
        helper.make_node("Add", ["x", "delta"], ["y"]),
    ]
    shapes = {"x": ["n", "s", 4], a.name: ["r", 4, "k"], b.name: ["r", "k", 4]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "s", 4])
    return helper.make_graph(nodes, "tiny", inputs, [output], [a, b, unused])


def _breaking_graph() -> onnx.GraphProto:
    """Return a graph whose node fails while it runs, if x and the given shape do not agree."""
    node = helper.make_node("Reshape", ["x", "shape"], ["y"], name="breaks")
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
        helper.make_tensor_value_info("shape", TensorProto.INT64, [1]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m"])
    return helper.make_graph([node], "tiny", inputs, [output])


# -- patch files -----------------------------------------------------------------------------------------------


def make_versions(out: Path) -> Path:
    """Write a patch file of each version to the new folder `out`."""
    out.mkdir()
    for version, (patch, dtype) in version_patches().items():
        patch.save(out / f"{version}.safetensors", dtype)
    return out


# -- all fixtures --------------------------------------------------------------------------------------------


def main() -> None:
    """Replace every committed fixture, after all new ones are made."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        sources = {name: open_source(make_source(name, root / "sources")) for name in SOURCES}
        written = root / FIXTURES.name
        written.mkdir()
        figures = {}
        for name, (source, _options) in FOLDERS.items():
            folder = make_folder(name, sources[source], written / name)
            figures[name] = torch_figures(sources[source], folder)
        make_graphs(written / GRAPHS.name)
        make_versions(written / VERSIONS.name)
        others = (*written.glob(f"{GRAPHS.name}/*"), *written.glob(f"{VERSIONS.name}/*"))
        listed = sorted([*written.glob(f"*/{SLOTS_FILE}"), *others])
        digests = {file.relative_to(written).as_posix(): sha256_file(file) for file in listed}
        (written / DIGESTS.name).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
        (written / FIGURES.name).write_text(json.dumps(figures) + "\n", encoding="utf-8")
        shutil.rmtree(FIXTURES, ignore_errors=True)
        shutil.copytree(written, FIXTURES)


if __name__ == "__main__":
    main()
