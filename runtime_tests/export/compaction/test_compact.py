"""The compaction of one layer as a whole, on random layers of each design of attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from runtime_tests.export.compaction.layers import Layer, random_layer, split
from tp_export.compaction import Ridges, compact
from tp_export.compaction import layer as layer_module
from tp_export.compaction.selection import select_seen
from tp_export.decoder import Entry

DESIGNS = {
    "one head for each": {"heads": 3, "kv_heads": 3, "bias": True},
    "grouped": {},
    "post-norm": {"post_norm": True},
    "post-norm with a bias": {"post_norm": True, "bias": True, "kv_heads": 4},
    "one key/value head": {"kv_heads": 1, "post_norm": True},
    "capped": {"softcap": 20.0},
    "windowed": {"window": 26},
    "windowed, context beyond the window": {"window": 12, "post_norm": True},
}


@pytest.fixture(params=DESIGNS.values(), ids=DESIGNS)
def layer(request: pytest.FixtureRequest) -> Layer:
    return random_layer(texts=24, **request.param)


def selected(layer: Layer, count: int) -> Entry:
    """Return the context's own entries with the largest shares."""
    rows, parts = layer.rows(), []
    weight = torch.ones(len(rows.query) * rows.group).double()
    for head in range(rows.kv_heads):
        kept = select_seen(rows.shares(head, layer.context[0][head])[0], weight, count)
        parts.append((layer.context[0][head][kept], layer.context[1][head][kept]))
    keys, values = zip(*parts, strict=True)
    return torch.stack(keys), torch.stack(values)


def test_all_entries_stay_the_contexts_own(layer: Layer) -> None:
    """They are exact already: no entry has to stand for another, and no value lacks anything."""
    keys, values = compact(layer.rows(), layer.context, 20, layer.target(), Ridges())
    assert torch.allclose(keys, layer.context[0], atol=1e-3) and torch.allclose(values, layer.context[1], atol=1e-3)
    assert layer.error((keys, values)) < 1e-4


@pytest.mark.parametrize("count", [3, 8])
def test_fitted_entries_are_closer_to_the_teacher_than_selected_ones(layer: Layer, count: int) -> None:
    """This holds on the fitted rows, and on rows that the fit has not seen."""
    fitted, held_out = split(layer, 18)
    entry = compact(fitted.rows(), fitted.context, count, fitted.target(), Ridges())
    assert entry[0].shape == entry[1].shape == (fitted.key.shape[1], count, 8)
    plain = selected(fitted, count)
    for rows in (fitted, held_out):
        assert rows.error(entry) < rows.error(plain) * (1 if count == 3 else 0.9)


def test_the_joint_values_bring_the_layer_closer(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    with_joint = compact(layer.rows(), layer.context, 6, layer.target(), Ridges())
    monkeypatch.setattr(layer_module, "_JOINT_COLUMNS", 0)
    without = compact(layer.rows(), layer.context, 6, layer.target(), Ridges())
    assert torch.equal(with_joint[0], without[0])  # they change values alone
    assert layer.error(with_joint) < layer.error(without)


def test_joint_values_fit_what_the_student_lacks_at_its_input() -> None:
    """If x_S differs from x_T, the values also have to bring back what the layers below have lost."""
    layer = random_layer(texts=24, kv_heads=4, width=12)
    lost = layer.projection @ torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.2
    target = replace(layer.target(), change=layer.target().change + lost)
    wanted = layer.branch(layer.outputs(layer.context)) + lost
    plain, fitted = (compact(layer.rows(), layer.context, 8, t, Ridges()) for t in (layer.target(), target))
    errors = [(layer.branch(layer.outputs(entry)) - wanted).square().mean() for entry in (plain, fitted)]
    assert errors[1] < 0.7 * errors[0]


def test_rows_count_by_their_weight() -> None:
    layer = random_layer(texts=12, kv_heads=4)
    weight = torch.ones(120).double()
    weight[:40] = 50.0
    even, heavy = (
        layer.branch(layer.outputs(compact(layer.rows(), layer.context, 5, layer.target(w), Ridges())))
        - layer.branch(layer.outputs(layer.context))
        for w in (None, weight)
    )
    assert heavy[:40].square().mean() < even[:40].square().mean()
    assert heavy[40:].square().mean() > even[40:].square().mean()
    scaled = compact(layer.rows(), layer.context, 5, layer.target(7 * weight), Ridges())
    again = compact(layer.rows(), layer.context, 5, layer.target(weight), Ridges())
    assert torch.allclose(scaled[0], again[0]) and torch.allclose(scaled[1], again[1], atol=1e-2)


@pytest.mark.parametrize("post_norm", [False, True])
def test_a_context_that_no_row_sees_gives_finite_entries(post_norm: bool) -> None:
    layer = random_layer(texts=3, post_norm=post_norm)
    far = replace(layer, context=(layer.context[0] - 1e5 * layer.query[0, 0, 0].sign(), layer.context[1]))
    for part in compact(far.rows(), far.context, 4, far.target(), Ridges()):
        assert part.isfinite().all()


def test_single_precision_suffices() -> None:
    layer = random_layer(texts=24, post_norm=True)
    single = replace(
        layer,
        query=layer.query.float(),
        key=layer.key.float(),
        value=layer.value.float(),
        projection=layer.projection.float(),
        context=(layer.context[0].float(), layer.context[1].float()),
        gain=None if layer.gain is None else layer.gain.float(),
    )
    target = replace(single.target(), weight=torch.ones(240))
    keys, values = compact(single.rows(), single.context, 6, target, Ridges())
    assert keys.dtype == values.dtype == torch.float32
    exact = compact(layer.rows(), layer.context, 6, layer.target(), Ridges())
    assert layer.error((keys.double(), values.double())) < 1.01 * layer.error(exact)
