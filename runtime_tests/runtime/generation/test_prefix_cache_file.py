"""The file of a prefix cache: a new process finds what was saved, and a file that does not fit changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.bad_patches import container
from runtime_tests.committed import FIXTURES
from runtime_tests.hostile import check_error, some_variants
from runtime_tests.logits import furthest, token_ids
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.errors import CacheFormatError, OutputError, RequestError, StaleCacheError
from tp_runtime.generation import PrefixCache
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.session import Graph, KVCache, Lengths, ModelFolder

SYSTEM = "You are a pirate, and you answer every question with one about the sea."
LEAD = [5, 6, 7]


@pytest.fixture(scope="module", params=["llama", "gemma"])
def graph(request: pytest.FixtureRequest) -> Graph:
    return Graph(ModelFolder.open(request.getfixturevalue(f"tiny_{request.param}_export")), "cpu")


def run(graph: Graph, ids: list[int], patch: Patch | None, store: PrefixCache) -> tuple[np.ndarray, int]:
    """Return the last logits, and the number of ids that were run for them; the store gets what was run."""
    bound = graph.bind(patch)
    cache = graph.new_cache(bound)
    store.fill(cache, ids)
    left = ids[len(cache) :]
    logits = graph.forward(left, cache, bound)
    store.keep(cache, lambda: graph.content(cache))
    return logits, len(left)


def found(graph: Graph, ids: list[int], patch: Patch | None, store: PrefixCache) -> int:
    """Return how many of the ids the store has."""
    cache = graph.new_cache(graph.bind(patch))
    store.fill(cache, [*ids, 9])
    return len(cache)


# -- what a file keeps ---------------------------------------------------------------------------------------


def test_a_new_session_finds_the_entries_under_their_keys(graph: Graph, tmp_path: Path) -> None:
    patch = patch_for(graph.folder, seed=1, scale=0.2)
    counts = Lengths(9, 4) if graph.folder.windowed else Lengths(5, 5)
    patches = [None, patch, 0.5 * patch, with_prefix(patch, graph.folder, LEAD, counts, 12)]
    ids, store = [*LEAD, *token_ids(30, seed=1)], PrefixCache(1 << 30)
    wanted = [run(graph, ids, one, store)[0] for one in patches]
    store.save(tmp_path / "c.safetensors", graph.folder)

    other = Graph(ModelFolder.open(graph.folder.path), "cpu")
    loaded = PrefixCache(1 << 30)
    assert loaded.load(tmp_path / "c.safetensors", other.folder) == 4
    assert (loaded.entries, loaded.bytes) == (store.entries, store.bytes)
    for one, logits in zip(patches, wanted, strict=True):
        got, count = run(other, ids, one, loaded)
        assert count == 1 and furthest(got, logits) < 1e-5
    assert found(other, ids, 0.25 * patch, loaded) == 0  # no other strength finds them
    # The same entries give the same file.
    again = PrefixCache(1 << 30)
    again.load(tmp_path / "c.safetensors", other.folder)
    again.save(tmp_path / "again.safetensors", other.folder)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_a_model_saves_and_loads_its_prefix_cache(tiny_llama_export: Path, tmp_path: Path) -> None:
    first = PatchedModel.from_pretrained(tiny_llama_export, "cpu", prefix_cache_bytes=1 << 26)
    wanted = first.generate("Hi", system=SYSTEM, max_new_tokens=6)
    first.save_prefix_cache(tmp_path / "c.safetensors")
    second = PatchedModel.from_pretrained(tiny_llama_export, "cpu", prefix_cache_bytes=1 << 26)
    assert second.load_prefix_cache(tmp_path / "c.safetensors") == 1
    assert second.generate("Hi", system=SYSTEM, max_new_tokens=6) == wanted
    assert second.prefix_cache is not None and (second.prefix_cache.hits, second.prefix_cache.misses) == (1, 0)
    plain = PatchedModel.from_pretrained(tiny_llama_export, "cpu")
    for call in (plain.save_prefix_cache, plain.load_prefix_cache):
        with pytest.raises(RequestError, match="without a prefix cache"):
            call(tmp_path / "c.safetensors")


def kept(store: PrefixCache, graph: Graph, tokens: list[int]) -> None:
    """Store an entry of zeros."""
    cache = graph.new_cache(graph.base)
    cache.tokens[:] = tokens
    kv = graph.folder.kv
    content = {
        past: np.zeros((kv.heads, len(tokens), kv.head_dim), kv.numpy_dtype) for past, _present in graph.kv.names
    }
    assert store.keep(cache, lambda: content)


def test_the_order_of_use_is_kept_and_the_budget_too(graph: Graph, tmp_path: Path) -> None:
    store = PrefixCache(1 << 30)
    for first in (1, 2, 3, 4):
        kept(store, graph, [first, 0])
    assert found(graph, [2], None, store) == 1  # used last
    store.save(tmp_path / "c.safetensors", graph.folder)
    each = store.bytes // 4
    for room, left in {4: [1, 3, 4, 2], 3: [3, 4, 2], 2: [4, 2], 1: [2]}.items():
        small = PrefixCache(room * each)
        assert small.load(tmp_path / "c.safetensors", graph.folder) == room and small.bytes == room * each
        assert [entry.tokens[0] for entry in small._entries] == left
    tiny = PrefixCache(1)
    assert tiny.load(tmp_path / "c.safetensors", graph.folder) == 0 and tiny.entries == 0
    # An entry that is larger than the budget does not keep the others out.
    kept(store, graph, [7] * 9)
    store.save(tmp_path / "c.safetensors", graph.folder)
    small = PrefixCache(3 * each)
    assert small.load(tmp_path / "c.safetensors", graph.folder) == 3


def test_loaded_entries_count_as_used_before_those_in_the_cache(graph: Graph, tmp_path: Path) -> None:
    saved = PrefixCache(1 << 30)
    for tokens in ([1, 0], [2, 0], [3, 0, 0]):
        kept(saved, graph, tokens)
    saved.save(tmp_path / "c.safetensors", graph.folder)
    store = PrefixCache(saved.bytes)  # room for seven ids
    for tokens in ([2, 0], [3, 0], [5, 0]):  # the first is in the file, the second is longer there
        kept(store, graph, tokens)
    assert store.load(tmp_path / "c.safetensors", graph.folder) == 1
    assert [entry.tokens.tolist() for entry in store._entries] == [[3, 0, 0], [2, 0], [5, 0]]
    assert store.bytes <= store.budget
    assert store.load(tmp_path / "c.safetensors", graph.folder) == 0  # nothing is stored twice


def test_an_empty_cache_can_be_saved_and_only_its_own_kind_of_file_is_replaced(graph: Graph, tmp_path: Path) -> None:
    store, file = PrefixCache(1000), tmp_path / "c.safetensors"
    for _ in range(2):
        store.save(file, graph.folder)
    assert store.load(file, graph.folder) == 0
    patch = patch_for(graph.folder)
    with pytest.raises(OutputError, match="not a patch"):
        patch.save(file)
    patch.save(tmp_path / "p.safetensors")
    (tmp_path / "notes.safetensors").write_bytes(b"precious")
    for name in ("p.safetensors", "notes.safetensors"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(OutputError, match="a file of a prefix cache to replace"):
            store.save(tmp_path / name, graph.folder)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(CacheFormatError, match=r"does not end in \.safetensors"):
        store.save(tmp_path / "c.bin", graph.folder)
    with pytest.raises(CacheFormatError, match="not one of a prefix cache"):
        store.load(tmp_path / "p.safetensors", graph.folder)


def test_entries_of_another_graph_are_refused(graph: Graph, tmp_path: Path) -> None:
    other = ModelFolder.open(FIXTURES / "tiny-llama-int8")
    store = PrefixCache(1 << 20)
    kept(store, graph, [1, 2])
    store.save(tmp_path / "c.safetensors", other)  # entries of another folder's graph are left out
    assert PrefixCache(1 << 20).load(tmp_path / "c.safetensors", other) == 0
    store.save(tmp_path / "c.safetensors", graph.folder)
    with pytest.raises(StaleCacheError, match="of another graph") as caught:
        PrefixCache(1 << 20).load(tmp_path / "c.safetensors", other)
    assert other.graph_digest in str(caught.value) and graph.folder.graph_digest in str(caught.value)


# -- damaged and hostile files -------------------------------------------------------------------------------


def parts(content: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Return the header, the parsed config and the tensors of a file."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["config"]), content[8 + length :]


@pytest.fixture(scope="module")
def saved(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with two entries: of the base, and of a patch with entries."""
    store, path = PrefixCache(1 << 30), tmp_path_factory.mktemp("saved") / "c.safetensors"
    entries = with_prefix(patch_for(graph.folder, seed=1), graph.folder, LEAD)
    for patch in (None, entries):
        run(graph, [*LEAD, 8, 9], patch, store)
    store.save(path, graph.folder)
    return path.read_bytes()


def refused(graph: Graph, path: Path, match: str) -> None:
    """Assert that loading the file raises an error with every part, and leaves the cache as it was."""
    store = PrefixCache(1 << 30)
    kept(store, graph, [3, 4])
    before = store._entries
    with pytest.raises(CacheFormatError, match=match) as caught:
        store.load(path, graph.folder)
    assert store._entries is before
    assert caught.value.field and caught.value.got is not None and caught.value.wanted and caught.value.fix
    check_error(caught.value, match)


Change = Callable[[dict[str, Any], dict[str, Any]], object]
CHANGES: Mapping[str, Change] = {
    "an unknown version": lambda header, config: header["__metadata__"].update(version="2"),
    "not one of a prefix cache": lambda header, config: header["__metadata__"].update(format="tp-patch"),
    "the config is not complete": lambda header, config: config.update(more=1),
    r"entries\[2\] is not an entry": lambda header, config: config["entries"].append(5),
    r"entries\[0\].terms is not a list of patches": lambda header, config: config["entries"][0].update(
        terms=[["p", 1]]
    ),
    r"entries\[1\].tokens is not a list of ids": lambda header, config: config["entries"][1].update(tokens=[]),
    "outside the vocabulary": lambda header, config: config["entries"][0].update(tokens=[5, 6, 7, 8, 10**6]),
    "is too long": lambda header, config: config["entries"][0].update(tokens=[5] * 10**4),
    "keys and values of every layer": lambda header, config: config["entries"].pop(),
    "is missing or unknown": lambda header, config: header.update({"x": header.pop("0.past_key_values.0.key")}),
    "wrong shape": lambda header, config: config["entries"][0].update(tokens=[5, 6, 7, 8]),
    r"has a wrong shape; got \[16, \d, \d\]; wanted": lambda header, config: header["1.past_key_values.1.key"].update(
        shape=header["1.past_key_values.1.key"]["shape"][::-1]
    ),
}


@pytest.mark.parametrize("match", CHANGES)
def test_a_file_with_one_defect_is_refused(graph: Graph, saved: bytes, tmp_path: Path, match: str) -> None:
    header, config, data = parts(saved)
    CHANGES[match](header, config)
    header["__metadata__"]["config"] = json.dumps(config)
    (tmp_path / "c.safetensors").write_bytes(container(header, data))
    refused(graph, tmp_path / "c.safetensors", match)


def test_truncated_files_and_files_of_other_kinds_are_refused(graph: Graph, saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    refused(graph, path, "there is no such file")
    refused(graph, tmp_path, "not a regular file")
    for length in (0, 7, 100, len(saved) - 1):
        path.write_bytes(saved[:length])
        refused(graph, path, "truncated|past the end of the file")
    path.write_bytes(saved + b"x")
    refused(graph, path, "trailing bytes")
    path.write_bytes((2**40).to_bytes(8, "little") + saved[8:])
    refused(graph, path, "the header length is over the limit")
    path.write_bytes(saved[:-4] + np.float32(np.nan).tobytes())
    refused(graph, path, "holds NaN or infinity")


def test_another_dtype_than_the_folders_is_refused(graph: Graph, saved: bytes, tmp_path: Path) -> None:
    header, _config, data = parts(saved)
    for name, entry in header.items():
        if name != "__metadata__":
            entry["dtype"], entry["shape"] = "F16", [entry["shape"][0] * 2, *entry["shape"][1:]]
    (tmp_path / "c.safetensors").write_bytes(container(header, data))
    refused(graph, tmp_path / "c.safetensors", "another dtype than the folder; got F16; wanted F32")


def test_any_hostile_value_is_loaded_or_refused_and_no_run_fails(graph: Graph, saved: bytes, tmp_path: Path) -> None:
    header, config, data = parts(saved)
    entries = with_prefix(patch_for(graph.folder, seed=1), graph.folder, LEAD)
    path = tmp_path / "c.safetensors"
    for document in (header, config):
        for what, text in some_variants(document, 300):
            if document is config:
                header["__metadata__"]["config"], raw = text, json.dumps(header)
                raw = json.dumps(header)
            else:
                raw = text
            path.write_bytes(container(raw.encode(), data))
            store = PrefixCache(1 << 30)
            try:
                store.load(path, graph.folder)
            except (CacheFormatError, StaleCacheError) as error:
                check_error(error, what)
                assert store.entries == 0, what
            for patch in (None, entries):
                assert np.isfinite(run(graph, [*LEAD, 8, 9, 10], patch, store)[0]).all(), what


def test_an_entry_that_does_not_fit_its_patch_is_dropped_when_it_is_found(
    graph: Graph, saved: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the patch says how many entries it puts in front, so the file alone cannot be checked for it."""
    header, config, data = parts(saved)
    (identity, strength), path = config["entries"][1]["terms"][0], tmp_path / "c.safetensors"
    config["entries"][1]["tokens"] = [*LEAD, 8]  # one id fewer than the arrays hold
    header["__metadata__"]["config"] = json.dumps(config)
    path.write_bytes(container(header, data))
    store, fresh = PrefixCache(1 << 30), PrefixCache(1 << 30)
    assert store.load(path, graph.folder) == 2
    entries = with_prefix(patch_for(graph.folder, seed=1), graph.folder, LEAD)
    assert entries.terms == ((identity, strength),)
    got, count = run(graph, [*LEAD, 8, 9, 10], entries, store)
    assert count == 3 and furthest(got, run(graph, [*LEAD, 8, 9, 10], entries, fresh)[0]) < 1e-5
    assert "does not fit its patch and was dropped" in caplog.text and store.entries == 2
    assert isinstance(graph.new_cache(graph.base), KVCache)


def test_more_tensors_than_the_budget_holds_are_not_read(
    graph: Graph, saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.safetensors").write_bytes(saved)
    read: list[int] = []
    monkeypatch.setattr(
        "tp_runtime.generation.prefix_cache_file._array",
        lambda file, past, place, raw: read.append(len(raw)) or np.zeros(place.shape, np.float32),
    )
    assert PrefixCache(10).load(tmp_path / "c.safetensors", graph.folder) == 0 and not read
