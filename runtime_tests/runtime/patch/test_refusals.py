"""The algebra and the constructor refuse bad input with the errors that the error table lists."""

from __future__ import annotations

import math

import numpy as np
import pytest

from runtime_tests.patches import random_config, random_patch
from tp_runtime.errors import BaseMismatchError, PatchShapeError, PatchTargetError, PatchValueError
from tp_runtime.patch import Delta, Patch

SLOT = (0, "mlp_out")


@pytest.mark.parametrize(
    "strength",
    [math.nan, math.inf, -math.inf, "2", None, True, 1j, 10**400, 10**5000, [2.0], np.nan, np.ones(2)],
    ids=lambda s: f"{s.bit_length()} bits" if type(s) is int else repr(s)[:8],
)
def test_a_bad_strength_is_refused(strength):
    for attempt in (lambda p: p * strength, lambda p: strength * p):
        with pytest.raises(PatchValueError, match=r"strength.*finite number.*Fix"):
            attempt(random_patch())


def test_a_strength_that_overflows_is_refused():
    with pytest.raises(PatchValueError, match=r"layers\.0\.mlp_out\.b.*NaN or infinity"):
        1e10 * random_patch(scale=1e30)


def test_strengths_whose_product_leaves_float32_are_refused():
    for s, t in [(1e20, 1e20), (1e-20, 1e-20), (1e-300, 1e300)]:
        with pytest.raises(PatchValueError, match=r"strength.*finite"):
            s * (t * random_patch())


def test_a_sum_that_overflows_is_refused():
    p = Patch({SLOT: Delta(bias=np.full(8, 3e38))}, random_config())
    with pytest.raises(PatchValueError, match="bias"):
        p + p


def test_patches_of_different_bases_cannot_be_added():
    p, q = random_patch(1), random_patch(2, config=random_config(base_digest="f" * 64))
    for attempt in (lambda: p + q, lambda: p - q, lambda: p + 0 * q):
        with pytest.raises(BaseMismatchError, match=r"base_digest.*f{64}.*wanted 0123"):
            attempt()


def test_repairs_of_different_precisions_cannot_be_added():
    p, q = (random_patch(config=random_config(precision=name)) for name in ("int8", "int4"))
    with pytest.raises(BaseMismatchError, match=r"precision.*'int4'.*'int8'"):
        p + q


@pytest.mark.parametrize("sizes", [{"inputs": 13}, {"outputs": 9}])
def test_patches_of_different_shapes_cannot_be_added(sizes):
    with pytest.raises(PatchShapeError, match=r"layers\.0\.mlp_out\.(a|b)"):
        random_patch() + random_patch(**sizes)
    with pytest.raises(PatchShapeError):
        random_patch(ranks=0, outputs=9) + random_patch(ranks=4)


def test_a_patch_and_another_object_cannot_be_added():
    with pytest.raises(TypeError):
        random_patch() + 1
    with pytest.raises(TypeError):
        random_patch() - None
    with pytest.raises(TypeError):
        1 + random_patch()


@pytest.mark.parametrize("rank", [0, -1, 1.0, "1", None, True])
def test_a_bad_rank_is_refused(rank):
    with pytest.raises(PatchValueError, match=r"rank.*wanted a whole number >= 1"):
        random_patch().truncate(rank)


def test_truncate_accepts_numpy_integers():
    assert random_patch(ranks=4).truncate(np.int64(2)).rank == 2


def test_a_delta_without_a_mean_cannot_be_truncated():
    p = Patch({SLOT: Delta(np.ones((3, 2)), np.ones((2, 4)))}, random_config())
    with pytest.raises(PatchValueError, match=r"layers\.0\.mlp_out\.mean.*Fix: export the patch at rank 1"):
        p.truncate(1)
    assert p.truncate(2) is p


def test_a_sum_cannot_be_truncated(tmp_path):
    total = random_patch(1) + random_patch(2)
    total.save(tmp_path / "sum.safetensors")
    for patch in (total, 0.5 * total, Patch.load(tmp_path / "sum.safetensors")):
        with pytest.raises(PatchValueError, match="truncate each patch before adding"):
            patch.truncate(2)
    assert (random_patch(1) + 0 * random_patch(2)).truncate(2).rank == 2


def test_a_patch_without_deltas_cannot_be_saved(tmp_path):
    with pytest.raises(PatchTargetError, match="holds no delta"):
        (0 * random_patch()).save(tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


A, B, BIAS, MEAN = np.ones((3, 2)), np.ones((2, 4)), np.ones(4), np.ones(3)


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ({"a": A}, PatchTargetError),
        ({"b": B}, PatchTargetError),
        ({"a": A, "bias": BIAS}, PatchTargetError),
        ({"bias": BIAS, "mean": MEAN}, PatchTargetError),
        ({"mean": MEAN}, PatchTargetError),
        ({}, PatchTargetError),
        ({"a": A, "b": np.ones((3, 4))}, PatchShapeError),
        ({"a": A, "b": B, "bias": np.ones(5)}, PatchShapeError),
        ({"a": A, "b": B, "mean": np.ones(4)}, PatchShapeError),
        ({"a": np.ones(3), "b": B}, PatchShapeError),
        ({"bias": np.ones((1, 4))}, PatchShapeError),
        ({"bias": np.float32(1)}, PatchShapeError),
        ({"a": np.ones((3, 0)), "b": np.ones((0, 4))}, PatchShapeError),
        ({"a": A, "b": np.full((2, 4), np.nan)}, PatchValueError),
        ({"bias": np.array([1, np.inf])}, PatchValueError),
        ({"bias": np.array([1e39])}, PatchValueError),
    ],
)
def test_a_bad_delta_is_refused(parts, error):
    with pytest.raises(error, match=r"layers\.0\.mlp_out\.") as caught:
        Patch({SLOT: Delta(**parts)}, random_config())
    assert "got" in str(caught.value) and "wanted" in str(caught.value) and caught.value.fix


@pytest.mark.parametrize("values", [np.array(["x"]), np.array([None]), np.ones(4) * 1j, np.ones(4, bool)])
def test_a_bias_that_is_not_an_array_of_numbers_is_refused(values):
    with pytest.raises(PatchValueError, match="bias: the value is not an array of numbers"):
        Delta(bias=values)


@pytest.mark.parametrize("slot", [(-1, "up"), (0, "mlp"), ("0", "up"), (0,), "up", (True, "up"), (10**6, "up")])
def test_a_bad_slot_is_refused(slot):
    with pytest.raises(PatchTargetError, match="no such slot"):
        Patch({slot: Delta(bias=BIAS)}, random_config())
