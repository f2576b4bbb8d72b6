"""The edge half compared with torch: logits of a graph in a session, with patches and caches.

Tiny Llama has one slot in each layer; tiny Gemma has every slot and layers with a sliding window.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime_tests.export.torch_logits import torch_logits
from runtime_tests.logits import furthest, graph_logits, token_ids
from runtime_tests.patches import patch_for
from tp_export.source import load_model, open_source
from tp_runtime.patch import Delta, Patch
from tp_runtime.session import Graph, ModelFolder

TOLERANCE = 1e-4
IDS = token_ids(64)
CHUNKS = {"all at once": (), "token by token": (1,) * 64, "in chunks": (5, 1, 20, 1, 2, 35)}


@pytest.fixture(scope="module", params=["llama", "gemma"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Graph]:
    """A torch model and its graph."""
    source, export = (request.getfixturevalue(f"tiny_{request.param}{end}") for end in ("", "_export"))
    return load_model(open_source(source)), Graph(ModelFolder.open(export), "cpu")


@pytest.fixture(scope="module")
def gemma(tiny_gemma: Path, tiny_gemma_export: Path) -> tuple[Any, Graph]:
    return load_model(open_source(tiny_gemma)), Graph(ModelFolder.open(tiny_gemma_export), "cpu")


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("rank", [None, 0, 1, 4, 60])
def test_logits_match_those_of_torch(pair: tuple[Any, Graph], rank: int | None, chunks: tuple[int, ...]) -> None:
    model, graph = pair
    patch = None if rank is None else patch_for(graph.folder, seed=1, rank=rank, scale=0.2)
    wanted = torch_logits(model, IDS, patch)
    assert furthest(graph_logits(graph, IDS, graph.bind(patch), chunks), wanted) < TOLERANCE
    if patch is not None:
        assert furthest(wanted, torch_logits(model, IDS)) > 0.1  # otherwise the patch has no effect


@pytest.mark.parametrize("site", ("mlp_out", "gate", "up", "q", "k", "v", "o", "down"))
def test_every_site_has_the_effect_of_its_hook_in_torch(gemma: tuple[Any, Graph], site: str) -> None:
    model, graph = gemma
    whole, base = patch_for(graph.folder, seed=2, rank=3, scale=0.5), torch_logits(model, IDS)
    for layer in range(graph.folder.layers):
        one_slot = Patch({(layer, site): whole.deltas[layer, site]}, whole.config)
        wanted = torch_logits(model, IDS, one_slot)
        assert furthest(wanted, base) > 30 * TOLERANCE
        assert furthest(graph_logits(graph, IDS, graph.bind(one_slot)), wanted) < TOLERANCE


def test_pairs_biases_and_layers_are_independent_of_each_other(pair: tuple[Any, Graph]) -> None:
    """The patch has mixed ranks, a pair without a bias, a bias without a pair, and a layer without a delta."""
    model, graph = pair
    wide, narrow = (patch_for(graph.folder, seed=3, rank=rank, scale=0.2) for rank in (9, 2))
    one, two = wide.deltas[0, "mlp_out"], narrow.deltas[1, "mlp_out"]
    patch = Patch({(0, "mlp_out"): Delta(one.a, one.b), (1, "mlp_out"): Delta(bias=two.bias)}, wide.config)
    wanted = torch_logits(model, IDS, patch)
    assert furthest(wanted, torch_logits(model, IDS)) > 0.05
    assert furthest(graph_logits(graph, IDS, graph.bind(patch)), wanted) < TOLERANCE


def test_sliding_layers_do_not_attend_beyond_their_window(gemma: tuple[Any, Graph]) -> None:
    model, graph = gemma
    ids = token_ids(40, seed=3)
    wanted = torch_logits(model, ids)
    for chunks in ((), (1,) * 40, (7, 9, 8, 16)):
        assert furthest(graph_logits(graph, ids, chunks=chunks), wanted) < TOLERANCE
    # Without the windows, the logits would differ by far more than the tolerance.
    windows = [layer.self_attn.sliding_window for layer in model.model.layers]
    assert windows == [8, None, 8]
    sliding, model.config.sliding_window = model.config.sliding_window, 64
    try:
        assert furthest(torch_logits(model, ids), wanted) > 30 * TOLERANCE
    finally:
        model.config.sliding_window = sliding


def test_sums_and_strengths_of_patches_match_torch(pair: tuple[Any, Graph]) -> None:
    model, graph = pair
    p, q = (patch_for(graph.folder, seed=seed, rank=3, scale=0.2) for seed in (5, 6))
    for expression in (-p, 0.5 * p, p + q, p - 0.25 * q):
        wanted = torch_logits(model, IDS, expression)
        assert furthest(graph_logits(graph, IDS, graph.bind(expression)), wanted) < TOLERANCE
    assert furthest(graph_logits(graph, IDS, graph.bind(p - p)), graph_logits(graph, IDS)) < TOLERANCE


def test_a_growing_cache_keeps_its_content(pair: tuple[Any, Graph]) -> None:
    model, graph = pair
    ids = token_ids(330, seed=4)
    patch = patch_for(graph.folder, seed=4, scale=0.2)
    wanted = torch_logits(model, ids, patch)
    bound = graph.bind(patch)
    for chunks in ((), (250, *(1,) * 16, 64), (256, 74), (1, 329)):
        assert furthest(graph_logits(graph, ids, bound, chunks), wanted) < TOLERANCE
