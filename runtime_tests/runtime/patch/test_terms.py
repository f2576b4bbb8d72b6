"""The terms of a patch state its values bit for bit: sessions and KV caches tell patches apart by their terms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_tests.patches import random_config, random_patch
from runtime_tests.runtime.patch.test_kv_prefix import arrays
from tp_runtime.errors import PatchValueError
from tp_runtime.patch import Delta, KVPrefix, Patch

SLOT = (0, "mlp_out")
ONE, TWO, THREE = (random_patch(seed, layers=2, ranks=[seed, 3]) for seed in (1, 2, 3))
strengths = st.floats(-8, 8).filter(lambda s: abs(s) > 1e-3)


def require_same_values(one: Patch, other: Patch) -> None:
    """Assert that both patches have the same terms, and the same bits in every array that is bound."""
    assert one.terms == other.terms and one.deltas.keys() == other.deltas.keys()
    for slot, delta in one.deltas.items():
        for part in ("a", "b", "bias"):
            mine, theirs = getattr(delta, part), getattr(other.deltas[slot], part)
            assert (mine is None) == (theirs is None)
            assert mine is None or mine.tobytes() == theirs.tobytes(), (slot, part)


@pytest.mark.parametrize("factors", [(10, 0.1), (0.1, 10), (-1, -1), (1 / 3, 3), (0.1, 3), (0.7, 0.2, 5)])
def test_a_patch_scaled_in_steps_has_the_values_of_the_product(factors):
    stepped, product = ONE, 1.0
    for factor in factors:
        stepped, product = factor * stepped, factor * product
    require_same_values(stepped, product * ONE)


def test_a_patch_scaled_there_and_back_is_the_patch():
    require_same_values(10 * (0.1 * ONE), ONE)
    assert (10 * (0.1 * ONE)).identity == ONE.identity


@settings(max_examples=60, deadline=None)
@given(strengths, strengths, strengths)
def test_sums_and_strengths_in_any_order_of_work_have_equal_values(s, t, u):
    require_same_values(s * (ONE + TWO), s * ONE + s * TWO)
    require_same_values((s * ONE + t * TWO) + u * THREE, s * ONE + (t * TWO + u * THREE))
    require_same_values(s * (t * (ONE - TWO)), (s * t) * ONE - (s * t) * TWO)
    require_same_values(sum([s * ONE, t * ONE, u * ONE]), s * ONE + (t * ONE + u * ONE))


def test_scaling_past_the_range_of_float32_and_back_is_exact():
    """A value that underflows or overflows on the way was lost before."""
    large = Patch({SLOT: Delta(bias=np.full(8, 1e-20))}, random_config())
    require_same_values(1e25 * (1e-25 * large), (1e25 * 1e-25) * large)
    with pytest.raises(PatchValueError, match="NaN or infinity"):
        1e30 * Patch({SLOT: Delta(bias=np.full(8, 1e20))}, random_config())


def test_order_sign_and_repetition_tell_patches_apart():
    expressions = [ONE + TWO, TWO + ONE, ONE - TWO, -(ONE + TWO), ONE + ONE, 2 * ONE, ONE - ONE, 3 * ONE, 0.3 * ONE]
    expressions += [(0.1 * 3) * ONE, ONE + 0.5 * ONE, ONE.truncate(1), TWO.truncate(1), 0 * ONE]
    assert len({patch.terms for patch in expressions}) == len(expressions)
    assert 0.1 * 3 != 0.3 and (0 * ONE).terms == (-0.0 * ONE).terms == (0 * (ONE - TWO)).terms == ()


def test_a_saved_combination_is_a_patch_of_its_own(tmp_path):
    scaled = 0.1 * ONE + TWO
    scaled.save(tmp_path / "p.safetensors", "f32")
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded.terms == ((loaded.identity, 1.0),) != scaled.terms and loaded.identity == scaled.identity
    scaled.save(tmp_path / "half.safetensors", "f16")  # half precision rounds, so it is another patch
    assert Patch.load(tmp_path / "half.safetensors").identity != scaled.identity


def test_a_changed_copy_of_a_combination_has_terms_of_its_own():
    changed = replace(0.5 * ONE, deltas={SLOT: Delta(bias=np.ones(8))})
    assert changed.terms == ((changed.identity, 1.0),)


def test_the_terms_of_a_kv_prefix_state_what_the_text_continues_from():
    config = random_config(method="prefix")
    given_ids = [1, 2]
    prefix = KVPrefix(arrays(), given_ids, np.int64(5))  # type: ignore[arg-type]
    patch = Patch({}, config, prefix)
    plain = Patch({}, config, KVPrefix(arrays(), (1, 2), 5))
    assert patch.terms == plain.terms
    given_ids.append(3)
    assert prefix.replaces == (1, 2)
    with pytest.raises(TypeError):
        prefix.entries[0, "key"] = np.zeros((3, 2, 4), np.float32)  # type: ignore[index]
    others = [KVPrefix(arrays(), (1, 3), 5), KVPrefix(arrays(), (1, 2), 6), KVPrefix(arrays(4), (1, 2), 5)]
    assert len({Patch({}, config, other).terms for other in others} | {plain.terms}) == 4


@pytest.mark.parametrize("make", [lambda values: values, lambda values: values[:], lambda values: values.T])
def test_the_values_of_a_patch_cannot_change_after_its_identity_was_computed(make):
    """A read-only array becomes writeable again through its owner, here the caller's array or the patch's own."""
    owner = np.ones((8, 8), np.float32)
    given_array = make(owner)
    given_array.setflags(write=False)
    entries = {name: np.ones((3, 2, 4), np.float32) for name in arrays()}
    patch = Patch({SLOT: Delta(given_array, given_array)}, random_config(), KVPrefix(entries, (1,), 5))
    before = patch.identity
    owner.setflags(write=True)
    owner[:] = 7
    for values in entries.values():
        values[:] = 7
    for held in (*patch.deltas[SLOT].parts().values(), *patch.prefix.entries.values()):
        for array in (held, held.base):
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.setflags(write=True)
    assert Patch(patch.deltas, patch.config, patch.prefix).identity == before
