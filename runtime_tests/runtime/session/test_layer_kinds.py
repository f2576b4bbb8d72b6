"""Entries with a count for each kind of layer: what they compute, the buffers that hold them, and what is refused.

Tiny Gemma has a full layer between two windowed ones; their window is 8. The tests in
runtime_tests/export/parity/test_entry_counts.py compare the logits with torch.
"""

from __future__ import annotations

import json
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.cli import Cli
from runtime_tests.committed import private_copy
from runtime_tests.folders import alter, describe, fill
from runtime_tests.logits import furthest, graph_logits, plain_session_logits, token_ids
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.errors import ModelFormatError, PatchShapeError, RequestError
from tp_runtime.generation import engine
from tp_runtime.model import PatchedModel
from tp_runtime.patch import KV_PARTS, KVPrefix, Patch
from tp_runtime.session import (
    WINDOWED_SHIFT,
    WINDOWED_TOTAL,
    Graph,
    KVCache,
    Lengths,
    ModelFolder,
    Windowed,
    past_name,
    prepare,
    probe,
    write_slots_file,
)
from tp_runtime.session.patch_binder import PatchBinder
from tp_runtime.session.prepared import prepared_graph

CLOSE = 1e-5
LEAD = [5, 6, 7]
IDS = [*LEAD, *token_ids(40, seed=1)]
FEWER, MORE = Lengths(20, 6), Lengths(4, 13)


@pytest.fixture(scope="module")
def graph(tiny_gemma_export: Path) -> Graph:
    return Graph(ModelFolder.open(tiny_gemma_export), "cpu")


def entries_of(graph: Graph, counts: int | Lengths, position: int = 25, seed: int | None = 3) -> Patch:
    patch = patch_for(graph.folder, seed=seed or 0, rank=3, scale=0.2)
    return with_prefix(patch if seed else Patch({}, patch.config), graph.folder, LEAD, counts, position)


def with_counts(graph: Graph, *counts: int) -> Patch:
    """Return a patch with a number of entries for each layer."""
    kv = graph.folder.kv
    shapes = {(layer, part): (n, kv.heads, kv.head_dim) for layer, n in enumerate(counts) for part in KV_PARTS}
    entries = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
    return Patch({}, replace(patch_for(graph.folder).config, method="prefix"), KVPrefix(entries, tuple(LEAD), 25))


# -- what is computed ------------------------------------------------------------------------------------------


def test_full_layers_with_the_whole_context_and_windowed_ones_with_its_end_equal_the_prompt(graph: Graph) -> None:
    context = token_ids(50, seed=2)
    cache = graph.new_cache(graph.base)
    graph.forward(context, cache, graph.base)
    content = graph.content(cache)

    def exact(windowed: int) -> Patch:
        kept = {0: windowed, 1: len(context), 2: windowed}
        entries = {
            (layer, part): content[past_name(layer, part)].transpose(1, 0, 2)[-kept[layer] :]
            for layer in kept
            for part in KV_PARTS
        }
        config = replace(patch_for(graph.folder).config, method="prefix")
        return Patch({}, config, KVPrefix(entries, tuple(LEAD), len(context)))

    assert graph.folder.windowed is not None
    window = graph.folder.windowed.window
    wanted = graph_logits(graph, [*context, *IDS[len(LEAD) :]])[len(context) :]
    for kept in (window - 1, window, 20):
        assert furthest(graph.run(IDS, graph.bind(exact(kept))), wanted) < 1e-4
    assert furthest(graph.run(IDS, graph.bind(exact(window - 3))), wanted) > 1e-2


@pytest.mark.parametrize("counts", [FEWER, MORE], ids=["fewer windowed", "more windowed"])
def test_steps_chunks_and_rewinds_give_the_logits_of_one_run(graph: Graph, counts: Lengths) -> None:
    bound = graph.bind(entries_of(graph, counts))
    wanted = graph.run(IDS, bound)
    assert furthest(wanted, graph.run(IDS, graph.base)[len(LEAD) :]) > 0.1
    cache = graph.new_cache(bound)
    for kept in (len(LEAD) + 15, len(LEAD), len(LEAD)):
        rows = [graph.forward([token], cache, bound)[0] for token in IDS[len(cache) :]]
        assert furthest(np.stack(rows), wanted[-len(rows) :]) < CLOSE
        del cache.tokens[kept:]
    for size in (40, 17, 9):
        chunks = [graph.forward(IDS[i : i + size], cache, bound, all_logits=True) for i in range(3, len(IDS), size)]
        assert furthest(np.concatenate(chunks), wanted) < CLOSE
        del cache.tokens[len(LEAD) :]


def test_with_nothing_bound_or_with_zeros_the_graph_is_the_base_bit_for_bit(graph: Graph) -> None:
    plain = plain_session_logits(graph.folder.path, IDS)
    zeros = {WINDOWED_SHIFT: np.zeros(1, np.int32), WINDOWED_TOTAL: np.zeros(1, np.int32)}
    assert np.array_equal(plain_session_logits(graph.folder.path, IDS, **zeros), plain)
    assert furthest(graph.run(IDS, graph.base), plain[0]) < CLOSE


def test_a_patch_set_as_default_gives_the_logits_of_the_bound_patch(graph: Graph) -> None:
    patch = entries_of(graph, FEWER)
    opened = Graph(graph.folder, "cpu", defaults=patch)
    assert opened.default.entries == FEWER
    assert furthest(opened.run(IDS, opened.default), graph.run(IDS, graph.bind(patch))) < CLOSE
    assert furthest(opened.run(IDS, opened.base), graph.run(IDS, graph.base)) < CLOSE


def test_a_prepared_graph_has_the_lengths_too(tmp_path: Path, graph: Graph) -> None:
    folder = ModelFolder.open(private_copy("tiny-gemma", tmp_path))
    assert prepare(folder) and prepared_graph(folder) is not None
    packed, patch = Graph(folder, "cpu"), entries_of(graph, FEWER)
    assert furthest(packed.run(IDS, packed.bind(patch)), graph.run(IDS, graph.bind(patch))) < CLOSE


def test_a_probe_is_reproduced(graph: Graph) -> None:
    patch = entries_of(graph, FEWER)
    found = probe.measure_probe(IDS, graph.run(IDS, graph.bind(patch)))
    assert probe.check_probe(graph, replace(patch, config=replace(patch.config, probe=found))).ok


# -- buffers ---------------------------------------------------------------------------------------------------


def test_the_cache_of_a_windowed_layer_is_smaller_if_it_has_fewer_entries(graph: Graph) -> None:
    bound = graph.bind(entries_of(graph, Lengths(400, 32), position=400))
    cache = graph.new_cache(bound)
    graph.forward(IDS[3:10], cache, bound)
    assert cache.lengths == (407, 39) and cache.filled == 407 and cache.shift == -368
    held = {name: array.shape[1] for name, array in graph.content(cache).items()}
    assert held == {past_name(layer, part): (39, 407, 39)[layer] for layer in range(3) for part in KV_PARTS}
    nbytes = {name: np.prod(value.shape()) * 4 for name, value in cache.buffers.items()}
    for part in KV_PARTS:
        assert 2 * nbytes[past_name(0, part)] == 2 * nbytes[past_name(2, part)] == nbytes[past_name(1, part)]


@pytest.mark.parametrize("counts", [Lengths(300, 200), Lengths(200, 300)], ids=["fewer windowed", "more windowed"])
def test_the_buffers_of_each_kind_grow_when_they_are_full(graph: Graph, counts: Lengths) -> None:
    """One kind begins with room for 256 positions and the other with 512, and the text outgrows the smaller one."""
    bound = graph.bind(entries_of(graph, counts, position=300))
    ids = [*LEAD, *token_ids(200, seed=5)]
    wanted, cache = graph.run(ids, bound), graph.new_cache(bound)
    rows = [graph.forward([token], cache, bound)[0] for token in ids[len(LEAD) : 53]]
    assert sorted({value.shape()[2] for value in cache.buffers.values()}) == [256, 512]
    assert cache.capacity == (356 if counts.full == 300 else 256)  # where the smaller buffers are full
    rows += [graph.forward([token], cache, bound)[0] for token in ids[53:]]
    assert {value.shape()[2] for value in cache.buffers.values()} == {512}
    assert furthest(np.stack(rows), wanted) < CLOSE


def test_the_context_window_counts_positions_and_not_entries(graph: Graph) -> None:
    window = graph.folder.context_window
    bound = graph.bind(entries_of(graph, FEWER, position=window - 4))
    assert graph.run([*LEAD, 1, 2, 3, 4], bound).shape[0] == 4
    with pytest.raises(RequestError, match="context window"):
        graph.run([*LEAD, 1, 2, 3, 4, 5], bound)
    with pytest.raises(RequestError, match="no room in the context window"):
        engine.check_request(graph.folder, [*LEAD, 1, 2, 3, 4], bound, 1)


def test_a_cache_without_entries_has_equal_lengths() -> None:
    cache = KVCache(("graph", ()))
    cache.tokens.extend([1, 2, 3])
    assert cache.lengths == (3, 3) and cache.shift == 0


# -- refusals --------------------------------------------------------------------------------------------------


def test_layers_of_one_kind_with_other_counts_are_refused(graph: Graph) -> None:
    with pytest.raises(PatchShapeError) as caught:
        graph.bind(with_counts(graph, 6, 20, 7))
    assert caught.value.field == "prefix.2" and "the windowed layers" in caught.value.problem
    assert caught.value.got == "7 entries" and caught.value.wanted == "6, as in layer 0"
    assert "one number of entries for each kind of layer" in str(caught.value.fix)
    assert graph.bind(with_counts(graph, 6, 20, 6)).entries == (20, 6)
    other = replace(graph.folder, windowed=Windowed((1,), 8))
    with pytest.raises(PatchShapeError, match=r"prefix\.2: the full layers of the KV prefix"):
        _over(graph, other).bind(with_counts(graph, 6, 20, 7))


def _over(graph: Graph, folder: ModelFolder) -> PatchBinder:
    """Return what binds patches to a graph with another description."""
    other = copy(graph._binder)
    other._folder = folder
    return other


def test_a_folder_that_an_earlier_version_exported_takes_one_count_only(graph: Graph) -> None:
    earlier = _over(graph, replace(graph.folder, windowed=None))
    with pytest.raises(PatchShapeError) as caught:
        earlier.bind(entries_of(graph, FEWER))
    assert caught.value.field == "prefix" and caught.value.got == "6 to 20 entries"
    assert caught.value.wanted == "one number of entries for all layers"
    assert "export it again with this version of tp-export" in str(caught.value.fix)
    assert earlier.bind(entries_of(graph, 9)).entries == (9, 9)


def test_a_model_with_one_kind_of_layers_takes_one_count_only(tiny_llama_export: Path) -> None:
    llama = Graph(ModelFolder.open(tiny_llama_export), "cpu")
    with pytest.raises(PatchShapeError, match="fit the patch with one number of entries for all layers"):
        llama.bind(with_counts(llama, 6, 20, 6))


def test_a_graph_of_the_route_optimum_takes_one_count_only(tmp_path: Path) -> None:
    graph = Graph(ModelFolder.open(private_copy("tiny-llama-optimum", tmp_path)), "cpu")
    with pytest.raises(PatchShapeError, match="Fix: export the model with --route fused"):
        graph.bind(with_counts(graph, 6, 20, 6))


def test_a_patch_that_is_refused_leaves_the_model_as_it_was(tiny_gemma_export: Path) -> None:
    model = PatchedModel.from_pretrained(tiny_gemma_export, "cpu")
    with pytest.raises(PatchShapeError):
        model.load_patch(with_counts(model.graph, 6, 20, 7), "p")
    assert list(model.patches) == [] and model.generate("Hello", max_new_tokens=2)


# -- the description -------------------------------------------------------------------------------------------


def test_a_folder_keeps_its_windowed_layers_and_other_folders_do_not_mention_any(tmp_path: Path) -> None:
    path = fill(tmp_path / "model")
    assert "windowed" not in json.loads((path / "patch_slots.json").read_text())
    assert ModelFolder.open(path).windowed is None
    write_slots_file(describe(path, windowed=Windowed((0,), 16)))
    assert json.loads((path / "patch_slots.json").read_text())["windowed"] == {"layers": [0], "window": 16}
    assert ModelFolder.open(path).windowed == Windowed((0,), 16)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [0],
        {"layers": [0]},
        {"layers": [0], "window": 0},
        {"layers": [0], "window": 8.0},
        {"layers": [], "window": 8},
        {"layers": [0, 1], "window": 8},
        {"layers": [2], "window": 8},
        {"layers": [-1], "window": 8},
        {"layers": [True], "window": 8},
        {"layers": [0, 0], "window": 8},
        {"layers": 0, "window": 8},
        {"layers": [0], "window": 8, "shift": 1},
    ],
)
def test_windowed_layers_of_another_form_are_refused(value: Any, tmp_path: Path) -> None:
    path = fill(tmp_path / "model")
    alter(path, lambda data: data.update(windowed=value))
    with pytest.raises(ModelFormatError, match="windowed"):
        ModelFolder.open(path)


def test_windowed_layers_of_the_route_optimum_are_refused(tmp_path: Path) -> None:
    path = fill(tmp_path / "model")
    with pytest.raises(ModelFormatError, match="only graphs of the route fused"):
        write_slots_file(describe(path, windowed=Windowed((0,), 16), route="optimum"))
    write_slots_file(describe(path, windowed=Windowed((0,), 16)))
    alter(path, lambda data: data.update(route="optimum"))
    with pytest.raises(ModelFormatError, match="only graphs of the route fused"):
        ModelFolder.open(path)


def test_a_description_that_contradicts_the_graphs_inputs_is_refused(tiny_gemma_export: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_gemma_export, tmp_path / "m")
    alter(path, lambda data: data.pop("windowed"))
    with pytest.raises(ModelFormatError, match=r"an unknown input with a default 'tp\.windowed_shift'"):
        Graph(ModelFolder.open(path), "cpu")
    path = private_copy("tiny-llama", tmp_path)
    alter(path, lambda data: data.update(windowed={"layers": [0], "window": 8}))
    with pytest.raises(ModelFormatError, match=r"no input with a default tp\.windowed_shift; no input"):
        Graph(ModelFolder.open(path), "cpu")


def test_inspect_shows_the_windowed_layers(tmp_path: Path, cli: Cli, tiny_gemma_export: Path) -> None:
    assert "a window of 8 in layers 0, 2" in cli("inspect", tiny_gemma_export).out
    assert cli("inspect", tiny_gemma_export, "--json").json["windowed"] == {"layers": [0, 2], "window": 8}
    small = cli("inspect", tiny_gemma_export, "--json").json["kv_bytes"]["512"]
    assert small == {"whole": 512 * 3 * 256, "window_cache": (512 + 2 * 16) * 256}  # 256 bytes a layer and position
    assert (
        "for a text of 512 tokens, 139.3 kB (139264 bytes) with --window-cache" in cli("inspect", tiny_gemma_export).out
    )
    path = fill(tmp_path / "model")
    assert "--window-cache" not in cli("inspect", path).out
    assert "a window of" not in cli("inspect", path).out and cli("inspect", path, "--json").json["windowed"] is None


def test_inspect_shows_the_entries_of_each_kind(tmp_path: Path, cli: Cli, graph: Graph) -> None:
    file = tmp_path / "p.safetensors"
    entries_of(graph, FEWER).save(file)
    assert "6 entries in layers 0, 2 and 20 entries in layers 1 for each head" in cli("inspect", file).out
    report = cli("inspect", file, "--json").json["prefix"]
    assert (report["entries"], report["counts"]) == (20, [6, 20, 6])
