"""The kinds of attention layers of a graph, and how many positions the layers of each kind hold.

A *full* layer attends to everything in its cache. A *windowed* layer attends to the last places of its cache only, as
many as its window has, the token itself included. A graph whose layers are all of one kind has one cache length for all
of them. A graph with both kinds has a length for each, so that a patch may store other numbers of entries for windowed
layers than for full ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..errors import PatchShapeError
from ..patch import KVPrefix


class Lengths(NamedTuple):
    """A number of positions for each kind of layer. In a graph with layers of one kind both numbers are equal.

    Attributes:
        full: the number of positions of full layers, which `attention_mask` counts.
        windowed: the number of positions of windowed layers.
    """

    full: int
    windowed: int


NO_ENTRIES = Lengths(0, 0)


@dataclass(frozen=True)
class Windowed:
    """The windowed layers of a graph that has full layers too.

    Attributes:
        layers: the numbers of these layers, ascending.
        window: the number of places of its cache that such a layer attends to.
    """

    layers: tuple[int, ...]
    window: int


def entry_counts(prefix: KVPrefix, windowed: Windowed | None, route: str) -> Lengths:
    """Return how many entries of a patch the layers of each kind hold.

    Args:
        prefix: the entries; their layers are those of the graph.
        windowed: the graph's windowed layers; None if the graph has one cache length for all layers.
        route: the graph's route, for the error.

    Raises:
        PatchShapeError: layers that share a cache length have different numbers of entries.
    """
    counts = prefix.counts
    if windowed is None:
        if min(counts) < prefix.longest:
            raise PatchShapeError(
                "the layers of the KV prefix have different numbers of entries, and the graph has one cache length",
                field="prefix",
                got=f"{prefix.amount} entries",
                wanted="one number of entries for all layers",
                fix=_EXPORT_FUSED if route != "fused" else _EXPORT_AGAIN,
            )
        return Lengths(counts[0], counts[0])
    found: dict[bool, int] = {}  # whether windowed -> the first layer of that kind
    for layer, count in enumerate(counts):
        first = found.setdefault(layer in windowed.layers, layer)
        if count != counts[first]:
            kind = "windowed" if layer in windowed.layers else "full"
            raise PatchShapeError(
                f"the {kind} layers of the KV prefix have different numbers of entries",
                field=f"prefix.{layer}",
                got=f"{count} entries",
                wanted=f"{counts[first]}, as in layer {first}",
                fix="fit the patch with one number of entries for each kind of layer",
            )
    return Lengths(counts[found[False]], counts[found[True]])


_EXPORT_FUSED = "export the model with --route fused, or fit the patch with one number of entries for all layers"
_EXPORT_AGAIN = (
    "if the model has full and windowed layers, export it again with this version of tp-export; otherwise fit the "
    "patch with one number of entries for all layers"
)
