"""The edge half compared with torch: entries with a count for each kind of layer.

Torch computes attention here by itself, over the entries and the text together. A layer's entries are at the places
0..n-1 of its cache and the text follows them; masks count places, and rotary embeddings count positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from runtime_tests.export.tiny import tiny_model
from runtime_tests.export.torch_logits import torch_logits
from runtime_tests.logits import Logits, furthest, token_ids
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_export.decoder import patched
from tp_export.graph import export_model
from tp_export.quantise import QuantisedStudent, quantised
from tp_export.source import Source, load_model, open_source
from tp_runtime.generation import Batch, Sampler
from tp_runtime.patch import FLOAT_PRECISIONS, KV_PARTS, KVPrefix, Patch
from tp_runtime.session import Graph, Lengths, ModelFolder

WINDOW = 16
LEAD = [5, 6, 7]
IDS = [*LEAD, *token_ids(45, seed=1)]  # more text than a window
# Kernels of quantised graphs also round activations, and torch does not.
TOLERANCE = {"fp32": 1e-4, "int4-rtn": 0.1}
COUNTS = {
    "equal": Lengths(9, 9),
    "fewer in windowed layers": Lengths(23, 5),
    "more in windowed layers": Lengths(4, 11),
    "more than the window": Lengths(40, 21),
}
LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A model like Gemma 3 with both kinds of layers, and widths that are multiples of a quantised block."""
    options = {"sliding_window": WINDOW, "layer_types": LAYER_TYPES, "num_hidden_layers": len(LAYER_TYPES)}
    folder = tmp_path_factory.mktemp("mixed")
    return open_source(tiny_model(folder, "gemma3_text", hidden_size=64, intermediate_size=128, **options))


@pytest.fixture(scope="module", params=TOLERANCE)
def pair(
    request: pytest.FixtureRequest, source: Source, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Graph]]:
    """A torch model and its graph, in float32 and in a quantised precision."""
    model, precision = load_model(source), request.param
    graph = Graph(ModelFolder.open(export_model(source, tmp_path_factory.mktemp(precision) / "m", precision=precision)))
    if precision in FLOAT_PRECISIONS:
        yield model, graph
    else:
        with QuantisedStudent.of(model, quantised(precision)).whole():
            yield model, graph


# -- attention by places -------------------------------------------------------------------------------------


def attend(
    prefix: KVPrefix,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Any,
    *,
    scaling: float,
    sliding_window: int | None = None,
    **_options: Any,
) -> tuple[Tensor, None]:
    """Attend to a layer's entries and to the text; query, key and value are [1, heads or kv heads, T, head dim]."""
    entries = [torch.from_numpy(np.array(prefix.entries[module.layer_idx, part])) for part in KV_PARTS]
    groups = query.shape[1] // key.shape[1]
    keys, values = (
        torch.cat([kept.transpose(0, 1)[None], text], 2).repeat_interleave(groups, 1)
        for kept, text in zip(entries, (key, value), strict=True)
    )
    places = torch.arange(keys.shape[2])
    own = places[len(entries[0]) :, None]
    seen = places <= own
    if sliding_window is not None:
        seen &= own - places < sliding_window
    scores = (query @ keys.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2), None


@contextmanager
def attention_by_places(model: Any, prefix: KVPrefix) -> Iterator[None]:
    AttentionInterface.register("by_places", partial(attend, prefix))
    AttentionMaskInterface.register("by_places", lambda *_args, **_options: None)
    before = model.config._attn_implementation
    model.config._attn_implementation = "by_places"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def direct(model: Any, patch: Patch, ids: list[int] = IDS) -> Logits:
    """Return the logits [T, vocab] of the ids after those that the entries replace."""
    prefix = patch.prefix
    assert prefix is not None
    text = torch.tensor([ids[len(prefix.replaces) :]])
    positions = prefix.position + torch.arange(text.shape[1])[None]
    with torch.no_grad(), attention_by_places(model, prefix), patched(model, Patch(patch.deltas, patch.config)):
        return model(text, position_ids=positions, use_cache=False).logits[0].numpy()


def patch_with(graph: Graph, counts: Lengths, seed: int | None = None) -> Patch:
    """Return a patch with entries, and with deltas if `seed` is given."""
    patch = patch_for(graph.folder, seed=seed or 0, scale=0.2)
    return with_prefix(patch if seed else Patch({}, patch.config), graph.folder, LEAD, counts, 45)


# -- tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 2], ids=["entries", "entries and deltas"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_entries_with_a_count_for_each_kind_match_torch(
    pair: tuple[Any, Graph], counts: Lengths, seed: int | None
) -> None:
    model, graph = pair
    patch = patch_with(graph, counts, seed)
    wanted = direct(model, patch)
    bound, tolerance = graph.bind(patch), TOLERANCE[graph.folder.precision]
    assert furthest(graph.run(IDS, bound), wanted) < tolerance
    # The same holds on a growing cache, and again after the cache was rewound.
    cache = graph.new_cache(bound)
    for kept in (len(LEAD) + 20, len(LEAD)):
        rows = [graph.forward([token], cache, bound)[0] for token in IDS[len(cache) :]]
        assert furthest(np.stack(rows), wanted[-len(rows) :]) < tolerance
        del cache.tokens[kept:]
    chunks = [graph.forward(IDS[i : i + 13], cache, bound, all_logits=True) for i in range(len(LEAD), len(IDS), 13)]
    assert furthest(np.concatenate(chunks), wanted) < tolerance


def test_a_batch_of_rows_with_other_counts_matches_torch(pair: tuple[Any, Graph]) -> None:
    model, graph = pair
    patches = [None, *(patch_with(graph, counts, number) for number, counts in enumerate(COUNTS.values()))]
    batch, steps = Batch(graph, len(patches), prefill_tokens=7), 25
    found: dict[Any, list[Any]] = {}
    step = batch._rows.step

    def recorded(rows: Any) -> Any:
        logits = step(rows)
        for row, own in zip(rows, logits, strict=True):
            found.setdefault(row, []).append(own.copy())
        return logits

    batch._rows.step = recorded  # type: ignore[method-assign]
    rows = []
    for number, patch in enumerate(patches):  # rows join one after the other, with prompts of other lengths
        options = {"sampler": Sampler(), "max_new_tokens": steps, "eos_ids": frozenset()}
        rows.append(batch.join(IDS[: 5 + 3 * number], graph.bind(patch), **options))  # type: ignore[arg-type]
        batch.step()
        batch.step()
    while batch.step():
        pass
    for row, patch in zip(rows, patches, strict=True):
        wanted = torch_logits(model, row.tokens[:-1]) if patch is None else direct(model, patch, row.tokens[:-1])
        assert len(found[row]) == steps
        # A step of a quantised batch rounds differently from a step of one row.
        assert furthest(np.stack(found[row]), wanted[-steps:]) < TOLERANCE[graph.folder.precision]


def test_the_last_entries_of_a_windowed_layer_stand_for_all_of_a_longer_context(pair: tuple[Any, Graph]) -> None:
    """Full layers keep the whole context, windowed ones what the window shows the first id of the text.

    The result is the model's own with the whole prompt in front.
    """
    model, graph = pair
    context = token_ids(50, seed=3)
    exact = with_context(graph, context, WINDOW - 1)
    wanted = torch_logits(model, [*context, *IDS[len(LEAD) :]])[len(context) :]
    tolerance = TOLERANCE[graph.folder.precision]
    assert furthest(graph.run(IDS, graph.bind(exact)), wanted) < tolerance
    fewer = with_context(graph, context, WINDOW - 6)
    assert furthest(direct(model, fewer), wanted) > 2 * tolerance  # otherwise the number has no effect


def with_context(graph: Graph, context: list[int], windowed: int) -> Patch:
    """Return a patch with the cache of `context`: all of it in full layers, the last `windowed` of it in the others."""
    assert graph.folder.windowed is not None
    cache = graph.new_cache(graph.base)
    graph.forward(context, cache, graph.base)
    content = graph.content(cache)
    entries = {}
    for layer in range(graph.folder.layers):
        kept = windowed if layer in graph.folder.windowed.layers else len(context)
        for part in KV_PARTS:
            entries[layer, part] = content[f"past_key_values.{layer}.{part}"].transpose(1, 0, 2)[-kept:]
    config = replace(patch_for(graph.folder).config, method="prefix")
    return Patch({}, config, KVPrefix(entries, tuple(LEAD), len(context)))
