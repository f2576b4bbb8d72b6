"""GPTQ: less error on the calibration rows than rounding to nearest, and the same blocks every time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from runtime_tests.export.tiny import tiny_model
from runtime_tests.logits import token_ids
from tp_export.inverse_factor import damped
from tp_export.quantise import BLOCK, Blocks, QuantisedStudent, log_probabilities, quantised
from tp_export.quantise import gptq as gptq_module
from tp_export.quantise.blocks import round_to_nearest
from tp_export.quantise.calibrated import head_hessian
from tp_export.quantise.gptq import gptq
from tp_export.source import load_model, open_source

SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False])
TEXTS = [token_ids(48, seed=seed) for seed in range(6)]


def rows(count: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Correlated rows with a mean, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return mixed / inputs**0.5 + 0.3


def matrix(inputs: int, outputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)


def error(blocks: Blocks, weight: np.ndarray, x: torch.Tensor) -> float:
    return float((x @ torch.from_numpy(blocks.dequantised() - weight)).square().mean())


@SYMMETRIC
@pytest.mark.parametrize(("inputs", "outputs", "count"), [(64, 24, 400), (96, 8, 30), (70, 5, 200), (20, 3, 100)])
@pytest.mark.parametrize("seed", range(5))
def test_the_products_change_less_than_by_rounding_to_nearest(
    inputs: int, outputs: int, count: int, seed: int, symmetric: bool
) -> None:
    weight, x = matrix(inputs, outputs, seed), rows(count, inputs, seed)
    found = gptq(weight, x.T @ x, symmetric)
    assert found.dequantised().shape == weight.shape and (found.zero_points is None) == symmetric
    assert error(found, weight, x) < 0.9 * error(round_to_nearest(weight, 4, symmetric), weight, x)


@SYMMETRIC
@pytest.mark.parametrize("inputs", [64, 70])
def test_coordinate_descent_lowers_the_loss_of_every_output(
    inputs: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = matrix(inputs, 12), rows(400, inputs)
    hessian = x.T @ x

    def losses() -> torch.Tensor:
        missed = torch.from_numpy(gptq(weight, hessian, symmetric).dequantised() - weight)
        return (missed * (damped(hessian, 0.01).float() @ missed)).sum(0)

    found = losses()
    monkeypatch.setattr(gptq_module, "descend", lambda _weight, _hessian, levels, scales, _zeros: (levels, scales))
    assert (found < losses()).all()


def test_outputs_that_are_rounded_apart_get_the_same_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = matrix(70, 12), rows(400, 70)
    together = gptq(weight, x.T @ x, symmetric=False).dequantised()
    monkeypatch.setattr(gptq_module, "_AT_ONCE", 5 * 70)
    assert np.allclose(gptq(weight, x.T @ x, symmetric=False).dequantised(), together, atol=1e-5)


@SYMMETRIC
def test_without_correlations_only_the_search_for_scales_is_left(symmetric: bool) -> None:
    weight = matrix(128, 32)
    identity = torch.eye(128)
    found, nearest = gptq(weight, identity, symmetric), round_to_nearest(weight, 4, symmetric)
    assert error(found, weight, identity) <= error(nearest, weight, identity)
    steps = np.repeat(np.abs(found.scales), BLOCK, axis=1).T
    inside = np.abs(weight) <= 6 * steps
    most = 0.5 if symmetric else 1.0  # a zero point is a whole number, so the levels may be half a step off
    assert (np.abs(found.dequantised() - weight)[inside] <= most * steps[inside] + 1e-6).all()


def test_a_weight_on_a_grid_of_sixteen_levels_is_found_again() -> None:
    weight = np.random.default_rng(0).integers(-8, 8, (64, 8)).astype(np.float32)
    weight[0::BLOCK] = -8
    x = rows(200, 64)
    assert np.abs(gptq(weight, x.T @ x, True).dequantised() - weight).max() < 1e-5


@pytest.mark.parametrize("hessian", [torch.zeros(64, 64), torch.diag(torch.tensor([1.0] + [0.0] * 63))])
def test_inputs_without_rows_and_weights_of_zeros_give_finite_blocks(hessian: torch.Tensor) -> None:
    weight = matrix(64, 4)
    weight[:BLOCK] = 0
    for symmetric in (True, False):
        found = gptq(weight, hessian, symmetric).dequantised()
        assert np.isfinite(found).all() and not found[:BLOCK].any()
        assert np.abs(found - weight).max() < 2.5


# -- whole models --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt2", "mixtral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(open_source(tiny_model(tmp_path_factory.mktemp("tiny"), request.param)))


def loss(model: Any, student: QuantisedStudent) -> float:
    """The mean KL in nats per token on the calibration texts."""
    total = 0.0
    for text in TEXTS:
        ids = torch.tensor([text])
        exact = log_probabilities(model, ids)
        with student.whole():
            total += float((exact.exp() * (exact - log_probabilities(model, ids))).sum(-1).mean())
    return total / len(TEXTS)


def test_a_calibrated_model_loses_less_and_every_layer_is_quantised(model: Any) -> None:
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    student = QuantisedStudent.of(model, quantised("int4-gptq-symmetric"), TEXTS)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    nearest = QuantisedStudent.of(model, quantised("int4-symmetric"))
    assert student.blocks.keys() == nearest.blocks.keys()
    assert loss(model, student) < 0.8 * loss(model, nearest)


def test_a_calibrated_head_loses_less_than_a_rounded_one(model: Any) -> None:
    precision = quantised("int4-gptq-head4")
    student = QuantisedStudent.of(model, precision, TEXTS)
    rounded = QuantisedStudent.of(model, replace(precision, calibrated_head=None), TEXTS)
    assert {blocks.bits for blocks in student.blocks.values()} == {4}
    assert loss(model, student) < loss(model, rounded)


def test_the_hessian_of_the_head_is_that_of_the_rows_that_it_reads(model: Any) -> None:
    rows = [model(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0] for text in TEXTS]
    wanted = sum(own.T @ own for own in rows)
    missed = head_hessian(model, TEXTS) - wanted
    assert missed.norm() < 1e-5 * wanted.norm()


def test_the_same_texts_give_the_same_weights(model: Any) -> None:
    first, again, other = (
        QuantisedStudent.of(model, quantised("int4-gptq"), texts).weights_digest for texts in (TEXTS, TEXTS, TEXTS[:2])
    )
    assert first == again != other and first is not None
    assert QuantisedStudent.of(model, quantised("int4-rtn")).weights_digest is None


def test_an_interruption_leaves_the_weights_of_the_model(model: Any) -> None:
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    calls = iter(range(3))

    def interrupted(weight: np.ndarray, hessian: torch.Tensor) -> Blocks:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return gptq(weight, hessian, symmetric=False)

    precision = replace(quantised("int4-gptq"), calibrated=interrupted)
    with pytest.raises(KeyboardInterrupt):
        QuantisedStudent.of(model, precision, TEXTS)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
