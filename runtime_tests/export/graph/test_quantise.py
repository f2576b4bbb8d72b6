"""Where the outputs of a student's weights are in a quantised graph."""

from __future__ import annotations

import numpy as np

from tp_export.graph.quantise import _Outputs
from tp_export.quantise.blocks import Blocks, round_to_nearest


def blocks(seed: int, zeros: slice) -> Blocks:
    """A weight of eight outputs, some of which are zeros."""
    weight = np.random.default_rng(seed).standard_normal((32, 8)).astype(np.float32)
    weight[:, zeros] = 0
    return round_to_nearest(weight, 4, symmetric=True)


def test_every_output_has_a_place_although_outputs_of_several_weights_are_equal() -> None:
    """As in a model with pruned rows: both weights begin with zeros, and the graph names them in another order."""
    own = {"one": blocks(0, slice(0, 2)), "two": blocks(1, slice(0, 3)), "three": blocks(2, slice(0, 8))}
    outputs, found = _Outputs(own), []
    for name in ("two", "three", "one"):
        weight = own[name].dequantised()
        joined, places = outputs.find(weight) or (own[name], [])
        assert np.array_equal(joined.dequantised(), weight)
        found += places
    assert sorted(found) == sorted((name, row) for name in own for row in range(8))


def test_a_weight_that_the_graph_holds_twice_has_the_same_places_twice() -> None:
    own = {"table": blocks(0, slice(4, 7)), "other": blocks(1, slice(1, 2))}
    outputs = _Outputs(own)
    for name in ("table", "other", "table", "other"):
        found = outputs.find(own[name].dequantised())
        assert found is not None
        assert np.array_equal(found[0].dequantised(), own[name].dequantised())
        if name == "table":
            assert found[1][:4] == [("table", row) for row in range(4)]
