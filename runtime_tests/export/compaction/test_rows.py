"""The rows of a layer: shares of entries and text under one softmax, against a softmax computed place by place."""

from __future__ import annotations

import pytest
import torch

from runtime_tests.export.compaction.layers import Layer, random_layer
from tp_export.compaction import text_part
from tp_export.decoder.attention import attend

DESIGNS = {
    "plain": {"heads": 2, "kv_heads": 2},
    "grouped": {},
    "windowed": {"window": 14, "n": 9},
    "window smaller than the entries": {"window": 6, "n": 9},
    "capped": {"softcap": 1.5},
    "windowed and capped": {"window": 5, "softcap": 0.8, "n": 7},
}


@pytest.fixture(params=DESIGNS.values(), ids=DESIGNS)
def layer(request: pytest.FixtureRequest) -> Layer:
    return random_layer(texts=3, steps=7, **request.param)


def test_the_shares_are_a_softmax_over_the_entries_and_the_text(layer: Layer) -> None:
    keys, rows, wanted = layer.context[0], layer.rows(), layer.shares(layer.context[0])
    n = keys.shape[1]
    for head in range(rows.kv_heads):
        shares, text = rows.shares(head, keys[head])
        own = rows.of_head(wanted.transpose(1, 2).flatten(0, 1), head)
        assert torch.allclose(shares, own[:, :n], atol=1e-12)
        assert torch.allclose(text, own[:, n:].sum(-1), atol=1e-12)
        assert torch.allclose(shares.sum(-1) + text, torch.ones(len(text)).double())
    if layer.window is not None:  # the last tokens of a text no longer see the first entries
        assert (shares == 0).any()


def test_shares_times_values_and_the_text_are_the_outputs_of_the_heads(layer: Layer) -> None:
    rows, wanted = layer.rows(), layer.outputs(layer.context)
    for head in range(rows.kv_heads):
        shares, text = rows.shares(head, layer.context[0][head])
        found = shares @ layer.context[1][head] + text[:, None] * rows.of_head(rows.out, head)
        assert torch.allclose(found, rows.of_head(wanted, head), atol=1e-12)


def test_the_text_part_is_the_layer_without_entries(layer: Layer) -> None:
    _lse, out = text_part(layer.heads)
    assert torch.allclose(out.flatten(0, 1), layer.outputs(None), atol=1e-12)


def test_attention_behind_entries_computes_the_same(layer: Layer) -> None:
    for entry in (layer.context, None):
        assert torch.allclose(attend(layer.heads, entry).flatten(0, 1), layer.outputs(entry), atol=1e-12)
