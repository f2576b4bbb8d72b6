"""A patch that was fitted on a float precision and runs on a quantised one: a warning says so once for each patch."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from runtime_tests.committed import FIXTURES
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.errors import BaseMismatchError
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch

IDS = [1, 2, 3, 4]


def patch_of(model: PatchedModel, precision: str, entries: bool = True) -> Patch:
    weights = patch_for(model.graph.folder, scale=0.1)
    patch = Patch(weights.deltas, replace(weights.config, precision=precision))
    return with_prefix(patch, model.graph.folder, IDS[:2]) if entries else patch


def opened(precision: str) -> PatchedModel:
    return PatchedModel.from_pretrained(FIXTURES / f"tiny-llama{precision}", "cpu")


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "fitted on" in record.getMessage()]


@pytest.mark.parametrize(("folder", "runs"), [("-int4", "int4-rtn"), ("-int8", "int8")])
@pytest.mark.parametrize("fitted", ["fp32", "fp16", "bf16"])
def test_float_entries_in_a_quantised_folder_are_noted_once(
    folder: str, runs: str, fitted: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = opened(folder)
    patch = patch_of(model, fitted)
    with caplog.at_level(logging.WARNING, "tp_runtime"):
        model.load_patch(patch, "p")
        model.logits(IDS, "p")
        model.logits(IDS, patch)
        model.logits(IDS, patch + patch_of(model, "fp32", entries=False))
    (message,) = messages(caplog)
    assert f"fitted on {fitted} and run on {runs} at a cost" in message and "\n" not in message
    assert f"--student-precision {runs}`" in message and repr(patch.name) in message
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tp_runtime"):
        model.load_patch(patch_of(model, fitted), "q")  # another patch has a note of its own
    assert len(messages(caplog)) == 1


def test_a_patch_that_the_model_is_opened_with_is_noted_too(caplog: pytest.LogCaptureFixture) -> None:
    patch = patch_of(opened("-int4"), "fp32")
    with caplog.at_level(logging.WARNING, "tp_runtime"):
        model = PatchedModel.from_pretrained(FIXTURES / "tiny-llama-int4", "cpu", patch=patch)
        model.logits(IDS)
    assert len(messages(caplog)) == 1


@pytest.mark.parametrize("fitted", ["fp32", "bf16"])
def test_float_weights_in_an_int4_folder_are_noted_once(fitted: str, caplog: pytest.LogCaptureFixture) -> None:
    model = opened("-int4")
    patch = patch_of(model, fitted, entries=False)
    with caplog.at_level(logging.WARNING, "tp_runtime"):
        model.load_patch(patch, "p")
        for other in ("p", patch, 0.5 * patch, patch + patch, 0.0 * patch):
            model.logits(IDS, other)
    (message,) = messages(caplog)
    assert f"fitted on {fitted} and runs on int4-rtn" in message and "\n" not in message
    assert "--student-precision int4-rtn`" in message and repr(patch.name) in message
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tp_runtime"):
        weights = patch_for(model.graph.folder, seed=5, scale=0.1)
        model.load_patch(Patch(weights.deltas, replace(weights.config, precision=fitted)), "q")
    assert len(messages(caplog)) == 1


def test_fitting_precisions_and_weights_on_int8_need_no_note(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tp_runtime"):
        for folder, precision, entries in (
            ("", "fp32", True),
            ("", "fp16", True),
            ("-int8", "fp32", False),
            ("-int4", "int4-rtn", False),
            ("-int4", "int4-rtn", True),
        ):
            model = opened(folder)
            model.load_patch(patch_of(model, precision, entries), "p")
    assert messages(caplog) == []


@pytest.mark.parametrize("folder", ["", "-int8"])
def test_entries_of_a_quantised_base_are_refused_on_every_other_precision(folder: str) -> None:
    model = opened(folder)
    with pytest.raises(BaseMismatchError, match="quantised base of another precision"):
        model.load_patch(patch_of(model, "int4-rtn"), "p")
