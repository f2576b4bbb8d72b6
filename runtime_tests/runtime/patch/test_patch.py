"""The algebra of patches, their identity and their config."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_tests.patches import DIGEST, apply_patch, random_config, random_patch
from tp_runtime.patch import Delta, Patch

SLOT = (0, "mlp_out")
quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**16)
strengths = st.floats(-8, 8).filter(lambda s: abs(s) > 1e-3)


@st.composite
def patches(draw):
    layers = draw(st.integers(1, 3))
    ranks = [draw(st.integers(0, 5)) for _ in range(layers)]
    sites = draw(st.sampled_from([("mlp_out",), ("gate", "up"), ("down", "mlp_out", "q")]))
    return random_patch(draw(seeds), layers, ranks, sites)


def inputs(seed=0):
    return np.random.default_rng(seed).standard_normal((5, 12))


def assert_adds(patch, wanted, tolerance=1e-4):
    """Assert that the patch adds `wanted` at every slot, and nothing at slots that `wanted` lacks."""
    got = apply_patch(patch, inputs())
    for slot in set(got) | set(wanted):
        np.testing.assert_allclose(
            got.get(slot, np.zeros(8)) + np.zeros((5, 8)),
            wanted.get(slot, np.zeros(8)) + np.zeros((5, 8)),
            atol=tolerance,
        )


# -- properties ----------------------------------------------------------------------------------------------


@quick
@given(patches(), patches())
def test_a_sum_adds_what_both_patches_add(p, q):
    one, two = apply_patch(p, inputs()), apply_patch(q, inputs())
    wanted = {slot: one.get(slot, 0.0) + two.get(slot, 0.0) for slot in set(one) | set(two)}
    assert_adds(p + q, wanted)
    assert (p + q).terms == p.terms + q.terms
    for slot, rank in (p + q).ranks.items():
        assert rank == p.ranks.get(slot, 0) + q.ranks.get(slot, 0)


@quick
@given(patches(), strengths)
def test_scaling_a_patch_scales_what_it_adds(p, s):
    assert_adds(s * p, {slot: s * value for slot, value in apply_patch(p, inputs()).items()})
    assert (s * p).terms == (p * s).terms == ((p.identity, s),)


@quick
@given(patches(), st.integers(-10, 10))
def test_scaling_by_powers_of_two_is_exact(p, exponent):
    back = 2.0**-exponent * (2.0**exponent * p)
    assert back.identity == p.identity and back.terms == p.terms


@quick
@given(patches())
def test_a_patch_minus_itself_adds_nothing(p):
    assert_adds(-p + p, {})
    assert_adds(p - p, {})
    assert (p - p).terms == ((p.identity, 1.0), (p.identity, -1.0))


@quick
@given(patches(), patches(), patches())
def test_addition_is_associative(p, q, r):
    total = sum([p, q, r])
    assert_adds(total, apply_patch(p + (q + r), inputs()))
    assert total.identity == ((p + q) + r).identity
    assert total.terms == (p + (q + r)).terms == p.terms + q.terms + r.terms


@quick
@given(patches(), strengths, strengths)
def test_strengths_multiply(p, s, t):
    assert (s * (t * p)).terms == ((p.identity, s * t),)


@quick
@given(patches(), st.integers(1, 6))
def test_truncation_keeps_the_effect_on_the_mean(p, rank):
    cut = p.truncate(rank)
    assert cut.rank <= rank and cut.deltas.keys() == p.deltas.keys()
    for slot, delta in p.deltas.items():
        if delta.a is not None:
            mean = delta.mean.astype(np.float64)
            new = cut.deltas[slot]
            np.testing.assert_array_equal(new.a, delta.a[:, :rank])
            np.testing.assert_array_equal(new.b, delta.b[:rank])
            np.testing.assert_allclose(
                mean @ new.a @ new.b + new.bias, mean @ delta.a @ delta.b + delta.bias, atol=1e-5
            )


@quick
@given(patches())
def test_f32_round_trip_is_exact(tmp_path_factory, p):
    path = tmp_path_factory.mktemp("f32") / "p.safetensors"
    p.save(path, dtype="f32")
    loaded = Patch.load(path)
    assert loaded.identity == p.identity and loaded.config == p.config and loaded.terms == p.terms
    for slot, delta in p.deltas.items():
        for part, values in delta.parts().items():
            np.testing.assert_array_equal(loaded.deltas[slot].parts()[part], values)


@quick
@given(patches(), st.sampled_from([("f16", 2.0**-11), ("bf16", 2.0**-8)]))
def test_a_half_precision_round_trip_rounds_once(tmp_path_factory, p, dtype_step):
    dtype, step = dtype_step
    path = tmp_path_factory.mktemp("half") / "p.safetensors"
    p.save(path, dtype=dtype)
    loaded = Patch.load(path)
    for slot, delta in p.deltas.items():
        for part, values in delta.parts().items():
            np.testing.assert_allclose(loaded.deltas[slot].parts()[part], values, rtol=step, atol=1e-7)
    again = path.with_name("again.safetensors")
    loaded.save(again)
    assert Patch.load(again).identity == loaded.identity
    assert again.read_bytes() == path.read_bytes()


# -- identity and terms --------------------------------------------------------------------------------------


def test_the_identity_depends_only_on_the_tensors(tmp_path):
    p = random_patch(1)
    exact = Patch(
        {slot: Delta(**{k: v.astype(np.float16) for k, v in d.parts().items()}) for slot, d in p.deltas.items()},
        p.config,
    )
    other = Patch(exact.deltas, random_config(name="other", created=None, probe=None))
    for number, (patch, dtype) in enumerate([(exact, "f16"), (exact, "f32"), (other, "f16")]):
        patch.save(tmp_path / f"{number}.safetensors", dtype=dtype)
        assert Patch.load(tmp_path / f"{number}.safetensors").identity == exact.identity


def test_the_identity_of_a_known_patch_is_fixed():
    # Caches and signatures are keyed by the identity, so a change of this value breaks compatibility.
    ones = Delta(np.ones((2, 1)), np.ones((1, 3)), np.zeros(3))
    wanted = "5a86d76c5e1ba4a9eea006fbafa8f497b25ba654882901f22bed7783435b6f5e"
    assert Patch({SLOT: ones}, random_config()).identity == wanted


@pytest.mark.parametrize("part", ["a", "b", "bias", "mean"])
def test_the_identity_depends_on_every_value(part):
    p = random_patch()
    changed = dict(p.deltas)
    values = changed[SLOT].parts()[part].copy()
    values.flat[-1] += 1
    changed[SLOT] = Delta(**{**changed[SLOT].parts(), part: values})
    assert Patch(changed, p.config).identity != p.identity


def test_the_identity_depends_on_site_and_layer():
    p = random_patch(layers=1)
    delta = p.deltas[SLOT]
    assert len({Patch({slot: delta}, p.config).identity for slot in [SLOT, (1, "mlp_out"), (0, "down")]}) == 3


def test_strength_zero_is_no_patch():
    p, q = random_patch(1), random_patch(2)
    nothing = 0 * p
    assert (
        nothing.terms == () and not nothing.deltas and nothing.rank == 0 and nothing.nbytes == nothing.memory_bytes == 0
    )
    assert (0.0 * (p + q)).terms == () and (p * -0.0).terms == ()
    assert (p + 0 * q).terms == p.terms and (0 * q + p).identity == p.identity
    assert (nothing + nothing).terms == () and (3 * nothing).terms == ()


def test_terms_keep_their_order_and_are_not_merged():
    p, q = random_patch(1), random_patch(2)
    assert (p + q).terms != (q + p).terms
    assert (p + p).terms == ((p.identity, 1.0),) * 2
    assert (0.5 * (p - 2 * q)).terms == ((p.identity, 0.5), (q.identity, -1.0))
    assert np.float32(2) * p is not p and (np.float32(2) * p).terms == ((p.identity, 2.0),)


def test_a_truncated_patch_has_its_own_identity(tmp_path):
    p = random_patch(ranks=4)
    cut = (0.5 * p).truncate(2)
    assert cut.terms == ((cut.identity, 1.0),) and cut.config.method == "output"
    assert cut.config.probe is None and cut.config.fidelity is None
    assert p.truncate(4) is p and p.truncate(9) is p
    cut.save(tmp_path / "cut.safetensors", dtype="f32")
    assert Patch.load(tmp_path / "cut.safetensors").identity == cut.identity


def test_the_config_of_a_scaled_patch_has_no_measurements():
    p = random_patch()
    assert (0.5 * p).config == dataclasses.replace(p.config, probe=None, fidelity=None)
    assert 1.0 * p is p


def test_the_config_of_a_sum_combines_both_configs():
    p = random_patch(1, config=random_config(name="p", context="be a pirate"))
    q = random_patch(2, config=random_config(name="q", precision="int8", licence="MIT", context_digest="cd" * 32))
    config = (p + q).config
    assert config.name == "p+q" and (p - q).name == "p-q" and config.method == "composed"
    assert config.base_digest == DIGEST and config.precision == "int8" and config.context_digest == ""
    assert config.licence == "(Apache-2.0) AND (MIT)"
    dropped = (
        config.context,
        config.ridge,
        config.calibration,
        config.fidelity,
        config.created,
        config.probe,
    )
    assert set(dropped) == {None}


def test_a_bias_and_a_pair_can_be_added():
    x = inputs()
    bias, pair = random_patch(1, ranks=0), random_patch(2, ranks=3)
    for total in (bias + pair, pair + bias):
        assert_adds(total, {s: apply_patch(bias, x)[s] + v for s, v in apply_patch(pair, x).items()})
    no_bias = Patch({SLOT: Delta(a=np.ones((12, 1)), b=np.ones((1, 8)))}, random_config())
    assert (bias + no_bias).deltas[SLOT].bias is bias.deltas[SLOT].bias
    assert (no_bias + no_bias).deltas[SLOT].bias is None


# -- immutability --------------------------------------------------------------------------------------------


def test_a_patch_cannot_be_changed():
    p = random_patch()
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.config = None
    with pytest.raises(TypeError):
        p.deltas[SLOT] = None
    with pytest.raises(ValueError, match="read-only"):
        p.deltas[SLOT].a[0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.deltas[SLOT].a = None


def test_a_patch_does_not_share_memory_with_the_arrays_it_was_made_from():
    bias = np.ones(8, np.float32)
    view = bias[:]
    view.setflags(write=False)
    probe = {"token_ids": [1], "top1": [2], "top1_logits": [0.5], "logsumexp": [1.0]}
    p = Patch({SLOT: Delta(bias=view)}, random_config(probe=probe))
    bias[:] = 7
    probe["top1"].append(3)
    assert p.deltas[SLOT].bias[0] == 1 and p.config.probe["top1"] == [2]


def test_slots_are_ordered_by_layer_then_site():
    p = random_patch(layers=11, ranks=1, sites=("up", "gate"))
    assert list(p.deltas) == sorted(p.deltas) and list(p.deltas)[-1] == (10, "up")


def test_a_scaled_patch_shares_the_first_factor():
    p = random_patch()
    assert (2 * p).deltas[SLOT].a is p.deltas[SLOT].a


def test_a_patch_reports_its_ranks_its_size_and_a_summary():
    p = random_patch(layers=2, ranks=[0, 3])
    assert p.ranks == {(0, "mlp_out"): 0, (1, "mlp_out"): 3} and p.rank == 3
    assert p.memory_bytes == 4 * (8 + 12 * 3 + 3 * 8 + 8 + 12)
    assert repr(p) == f"<Patch 'pirate': output, 2 slots, rank 3, {p.nbytes} bytes in f16>"
