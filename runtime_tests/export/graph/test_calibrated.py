"""Calibrated precisions: folders that give back the weights that they compute with, and patches fitted behind them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.export.graph.precisions import QUESTIONS, TEXTS, divergence, logits, model_logits
from tp_export.fit import Recipe, make_patch
from tp_export.formats import write_onnx_adapter
from tp_export.graph import check_against_source, export_model, stored_student
from tp_export.graph import stored as stored_module
from tp_export.graph.quantise import PLACES
from tp_export.quantise import precision as precision_module
from tp_export.quantise import quantised
from tp_export.source import Source
from tp_runtime.errors import BaseMismatchError, ModelFormatError
from tp_runtime.session import ModelFolder


@pytest.fixture(scope="module")
def calibrated(source: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of one calibrated precision, of two calibrations."""
    root, folders = tmp_path_factory.mktemp("calibrated"), {}
    for name, texts in {"one": TEXTS, "two": TEXTS[:2]}.items():
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("tp_export.fit.student.calibration_texts", lambda *_arguments, own=texts: own)
            folders[name] = export_model(source, root / name, precision="int4-gptq", route="fused")
    return folders


def test_a_folder_gives_back_the_weights_that_it_computes_with(
    calibrated: dict[str, Path], source: Source, model: Any
) -> None:
    digests, exact = {}, model_logits(model)
    for name, path in calibrated.items():
        folder = ModelFolder.open(path)
        student = stored_student(model, folder)
        assert student is not None and student.precision == "int4-gptq"
        digests[name] = folder.weights_digest
        assert student.weights_digest == folder.weights_digest
        with student.whole():
            wanted = model_logits(model)
        # The graph also rounds activations, for a tenth of the small loss of these weights.
        assert divergence(wanted, logits(path)) < 0.5 * divergence(wanted, exact)
        assert any("int4-gptq" in line for line in check_against_source(folder, source))
    assert digests["one"] != digests["two"]
    with pytest.raises(ModelFormatError, match="does not give back the weights"):
        stored_student(model, replace(ModelFolder.open(calibrated["one"]), weights_digest=digests["two"]))


@pytest.mark.parametrize("precision", ["int8", "int4-gptq"])
def test_a_folder_of_an_earlier_version_gives_back_its_narrow_blocks_of_eight_bits(
    precision: str, source: Source, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They had 32 values, and the places of calibrated weights did not say how many bits a value has."""
    monkeypatch.setattr("tp_export.fit.student.calibration_texts", lambda *_arguments: TEXTS[:2])
    with monkeypatch.context() as earlier:
        earlier.setitem(precision_module._QUANTISED, precision, quantised(precision).with_narrow_blocks())
        path = export_model(source, tmp_path / "m", precision=precision, route="fused")
    load = stored_module.ir.load

    def without_bits(file: Path) -> Any:
        graph = load(file)
        if PLACES in graph.metadata_props:
            places = json.loads(graph.metadata_props[PLACES])
            graph.metadata_props[PLACES] = json.dumps(
                {name: {key: value for key, value in place.items() if key != "bits"} for name, place in places.items()}
            )
        return graph

    monkeypatch.setattr(stored_module.ir, "load", without_bits)
    folder = ModelFolder.open(path)
    student = stored_student(model, folder)
    assert student is not None and student.weights_digest == folder.weights_digest
    assert {(blocks.bits, blocks.block) for blocks in student.blocks.values()} <= {(8, 32), (4, 32)}
    exact = model_logits(model)
    with student.whole():
        wanted = model_logits(model)
    assert divergence(wanted, logits(path)) < (0.8 * divergence(wanted, exact) if precision == "int4-gptq" else 1e-4)


@pytest.mark.parametrize("precision", ["int4-gptq-fp16", "int4-gptq-symmetric-head4"])
def test_a_calibrated_folder_in_float16_or_with_a_calibrated_head_gives_back_its_weights_too(
    precision: str, source: Source, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tp_export.fit.student.calibration_texts", lambda *_arguments: TEXTS[:2])
    folder = ModelFolder.open(export_model(source, tmp_path / "half", precision=precision, route="fused"))
    student = stored_student(model, folder)
    assert student is not None and student.weights_digest == folder.weights_digest is not None
    assert all(blocks.scales.dtype == np.float32 for blocks in student.blocks.values())


def test_a_patch_behind_calibrated_weights_fits_no_others(
    calibrated: dict[str, Path], source: Source, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = stored_student(model, ModelFolder.open(calibrated["one"]))
    assert student is not None
    recipe = Recipe(student_precision=student.precision, max_new_tokens=16)
    patch = make_patch(source, model, None, QUESTIONS[:14], QUESTIONS[14:], recipe, name="repair", student=student)
    assert patch.config.weights_digest == student.weights_digest
    assert patch.config.fidelity is not None and patch.config.fidelity["gap_closed"] > 0
    logits(calibrated["one"], patch)
    for scaled in (patch, 0.5 * patch, patch + patch):
        with pytest.raises(BaseMismatchError, match="--student"):
            logits(calibrated["two"], scaled)
    with pytest.raises(BaseMismatchError, match="weights_digest"):
        write_onnx_adapter(patch, ModelFolder.open(calibrated["two"]), tmp_path / "p.onnx_adapter")
    write_onnx_adapter(patch, ModelFolder.open(calibrated["one"]), tmp_path / "p.onnx_adapter")
    monkeypatch.setattr("tp_export.fit.student.calibration_texts", lambda *_arguments: TEXTS[:2])
    with pytest.raises(BaseMismatchError, match="weights_digest"):
        export_model(source, tmp_path / "out", precision="int4-gptq", route="fused", patch=patch)
