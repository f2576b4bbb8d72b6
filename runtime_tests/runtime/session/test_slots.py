"""The arrays that are bound to a slot, and which patches fit a set of slots. No graph is opened."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_tests.patches import DIGEST, random_config, random_patch
from tp_runtime.errors import BaseMismatchError, PatchShapeError, PatchTargetError, PatchValueError
from tp_runtime.patch import Delta, Patch
from tp_runtime.session import Slot, check_base, fit_slots, slot_arrays

SLOT = Slot(1, "mlp_out", 12, 8)
SLOTS = {(layer, "mlp_out"): Slot(layer, "mlp_out", 12, 8) for layer in range(2)}


# -- arrays --------------------------------------------------------------------------------------------------


@given(rank=st.integers(0, 5), bias=st.booleans(), seed=st.integers(0, 9), dtype=st.sampled_from(["f4", "f2"]))
def test_bound_arrays_compute_the_same_as_the_delta(rank: int, bias: bool, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    a, b, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((12, rank), (rank, 8), (2, 3, 12)))
    shift = rng.standard_normal(8).astype(np.float32) if bias else None
    arrays = slot_arrays(Delta(a, b, shift) if rank else Delta(bias=shift), SLOT, np.dtype(dtype))
    assert {name: array.shape for name, array in arrays.items()} == {
        "tp.1.mlp_out.a": (1, 12, rank),
        "tp.1.mlp_out.b": (1, rank, 8),
        "tp.1.mlp_out.bias": (1, 1, 8),
    }
    assert all(array.dtype == dtype and array.flags.c_contiguous for array in arrays.values())
    bound_a, bound_b, bound_bias = (array.astype(np.float32) for array in arrays.values())
    wanted = (x @ a) @ b + (0 if shift is None else shift)
    assert np.abs((x @ bound_a) @ bound_b + bound_bias - wanted).max() < (1e-5 if dtype == "f4" else 0.1)


def test_a_slot_without_a_delta_gets_rank_zero_and_a_bias_of_zeros() -> None:
    arrays = slot_arrays(None, SLOT, np.float32)
    assert [array.shape for array in arrays.values()] == [(1, 12, 0), (1, 0, 8), (1, 1, 8)]
    assert not arrays["tp.1.mlp_out.bias"].any()


@pytest.mark.parametrize("part", ["a", "b", "bias"])
def test_a_value_too_large_for_float16_is_refused_there_and_accepted_in_float32(part: str) -> None:
    parts = {"a": np.ones((12, 2)), "b": np.ones((2, 8)), "bias": np.ones(8)}
    parts[part].flat[-1] = -70000.0
    delta = Delta(**parts)
    with pytest.raises(PatchValueError) as error:
        slot_arrays(delta, SLOT, np.float16)
    assert error.value.field == f"layers.1.mlp_out.{part}"
    assert error.value.got == 70000.0 and "65504" in str(error.value.wanted) and error.value.fix
    assert slot_arrays(delta, SLOT, np.float32)[f"tp.1.mlp_out.{part}"].min() == -70000.0


def test_the_largest_float16_still_fits() -> None:
    arrays = slot_arrays(Delta(bias=np.full(8, 65504.0)), SLOT, np.float16)
    assert (arrays["tp.1.mlp_out.bias"] == np.float16(65504)).all()


def test_a_slot_with_a_scale_gets_b_and_bias_times_the_scale_and_a_as_it_is() -> None:
    parts = {"a": np.ones((12, 2)), "b": np.full((2, 8), -70000.0), "bias": np.full(8, 70000.0)}
    arrays = slot_arrays(Delta(**parts), replace(SLOT, scale=2.0**-5), np.float16)
    assert [float(array.flat[0]) for array in arrays.values()] == [1.0, np.float16(-2187.5), np.float16(2187.5)]


# -- fit -----------------------------------------------------------------------------------------------------


def test_a_patch_that_fits_returns_its_deltas() -> None:
    patch = random_patch(layers=2)
    assert dict(fit_slots(patch, SLOTS)) == dict(patch.deltas)
    part = random_patch(layers=1)
    assert list(fit_slots(part, SLOTS)) == [(0, "mlp_out")]
    assert not fit_slots(0 * patch, SLOTS)


@pytest.mark.parametrize(
    ("changes", "error", "field", "got", "wanted"),
    [
        ({"layers": 3}, PatchShapeError, "layers.2.mlp_out", "layer 2", "0..1"),
        ({"sites": ("gate",)}, PatchTargetError, "layers.0.gate", "site gate", "one of mlp_out"),
        ({"inputs": 13}, PatchShapeError, "layers.0.mlp_out.a", 13, "12 inputs"),
        ({"outputs": 9}, PatchShapeError, "layers.0.mlp_out.b", 9, "8 outputs"),
        ({"outputs": 9, "ranks": 0}, PatchShapeError, "layers.0.mlp_out.bias", 9, "8 outputs"),
        ({"layers": 2, "ranks": [1, 0], "outputs": 9}, PatchShapeError, "layers.0.mlp_out.b", 9, "8 outputs"),
    ],
)
def test_the_error_names_the_slot_that_does_not_fit(
    changes: dict, error: type[PatchShapeError], field: str, got: object, wanted: str
) -> None:
    with pytest.raises(error) as raised:
        fit_slots(random_patch(**changes), SLOTS)
    assert (raised.value.field, raised.value.got, raised.value.wanted) == (field, got, wanted)
    assert raised.value.fix


def test_only_the_slot_that_does_not_fit_is_named() -> None:
    good, bad = random_patch(layers=2), random_patch(layers=2, inputs=13)
    mixed = Patch({(0, "mlp_out"): good.deltas[0, "mlp_out"], (1, "mlp_out"): bad.deltas[1, "mlp_out"]}, good.config)
    with pytest.raises(PatchShapeError, match=r"layers\.1\.mlp_out\.a"):
        fit_slots(mixed, SLOTS)


def test_a_graph_without_slots_accepts_only_the_empty_patch() -> None:
    with pytest.raises((PatchShapeError, PatchTargetError)):
        fit_slots(random_patch(), {})
    assert not fit_slots(0 * random_patch(), {})


# -- base ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fitted", ["fp32", "fp16", "bf16", "int8", "int4-rtn", "int4-rtn-fp16"])
@pytest.mark.parametrize("exported", ["fp32", "fp16", "int8", "int4-rtn", "int4-rtn-fp16"])
def test_a_patch_fitted_in_float_fits_every_precision_and_a_quantised_one_only_its_own(
    fitted: str, exported: str
) -> None:
    """int4-rtn-fp16 is not a precision of its own here: its weights are those of int4-rtn."""
    patch, weights = Patch(random_patch().deltas, random_config(precision=fitted)), exported.removesuffix("-fp16")
    for candidate in (patch, 0.5 * patch, patch + random_patch(), patch.truncate(1)):
        if fitted.removesuffix("-fp16") in ("fp32", "fp16", "bf16", weights):
            check_base(candidate, "tests/tiny", DIGEST, exported)
        else:
            with pytest.raises(BaseMismatchError) as error:
                check_base(candidate, "tests/tiny", DIGEST, exported)
            assert (error.value.field, error.value.wanted) == ("precision", weights)
            assert error.value.got in (fitted, fitted.removesuffix("-fp16"))  # a sum names the weights


def test_the_error_of_another_base_names_both_digests() -> None:
    patch = random_patch()
    with pytest.raises(BaseMismatchError) as error:
        check_base(patch, "tests/other", "f" * 64, "fp32")
    assert error.value.field == "base_digest"
    assert error.value.got == f"{DIGEST[:16]} (tests/tiny-llama)"
    assert error.value.wanted == f"{'f' * 16} (tests/other)"
    with pytest.raises(BaseMismatchError):
        check_base(
            Patch(patch.deltas, replace(patch.config, base_model="tests/other")), "tests/other", "f" * 64, "fp32"
        )
