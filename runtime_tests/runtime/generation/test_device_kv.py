"""The keys and values of a batch where the device copies them, as on CUDA; here ONNX Runtime copies them on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime_tests.committed import private_copy
from runtime_tests.logits import token_ids
from tp_runtime.generation import Batch, PrefixCache, Row, Sampler, generate
from tp_runtime.session import DeviceCopies, Graph, ModelFolder


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    folder: Path = private_copy("tiny-llama", tmp_path_factory.mktemp("export"))
    opened: Any = Graph(ModelFolder.open(folder), "cpu", threads=1)
    opened.kv.copies = DeviceCopies(opened.ort, opened.device, opened.dtype)
    return opened


def join(batch: Batch, graph: Graph, prompt: list[int], new_tokens: int = 12) -> Row:
    return batch.join(prompt, graph.base, sampler=Sampler(), max_new_tokens=new_tokens, eos_ids=frozenset())


def completion(graph: Graph, prompt: list[int], new_tokens: int = 12) -> list[int]:
    ids = generate(graph, prompt, graph.base, sampler=Sampler(), max_new_tokens=new_tokens, eos_ids=frozenset())
    return list(ids)


def finish(batch: Batch) -> None:
    while batch.step():
        pass


def places(batch: Batch) -> int:
    rows: Any = batch._rows
    return rows._kv._places


def test_a_row_that_ends_leaves_its_keys_and_values_to_the_prefix_cache(graph: Graph) -> None:
    store = PrefixCache(2**24)
    batch = Batch(graph, 2, store)
    first, other = join(batch, graph, token_ids(9, seed=1)), join(batch, graph, token_ids(5, seed=2), 30)
    while first in batch.rows or not first.finish_reason:
        batch.step()
    again = join(batch, graph, [*first.tokens, 7, 8])
    finish(batch)
    assert store.hits == 1
    for row in (first, other, again):
        assert row.tokens[row.prompt_tokens :] == completion(
            graph, row.tokens[: row.prompt_tokens], len(row.tokens) - row.prompt_tokens
        )


def test_a_batch_has_places_for_the_rows_it_needs_and_starts_anew_when_it_was_empty(graph: Graph) -> None:
    batch = Batch(graph, 6)
    for number, wanted in enumerate((1, 2, 4, 4, 6, 6), start=1):
        join(batch, graph, token_ids(4, seed=number), 20)
        batch.step()
        assert places(batch) == wanted
    finish(batch)
    last = join(batch, graph, [9, 8])
    batch.step()
    assert places(batch) == 1
    finish(batch)
    assert last.tokens[2:] == completion(graph, [9, 8])


@pytest.mark.parametrize("failing", ["new", "copy"])
@pytest.mark.parametrize("at", [1, 3])
def test_rows_that_step_are_not_lost_when_the_device_has_no_memory_for_another(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, failing: str, at: int
) -> None:
    batch = Batch(graph, 4)
    prompts = [token_ids(length, seed=length) for length in (6, 7, 8)]
    rows = [join(batch, graph, prompt) for prompt in prompts[:2]]
    batch.step()
    kv: Any = graph.kv
    real, calls = getattr(kv.copies, failing), []

    def fail(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > at:
            raise MemoryError
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(kv.copies, failing, fail)
        refused = join(batch, graph, prompts[2])
        batch.step()
    assert isinstance(refused.error, MemoryError)
    rows.append(join(batch, graph, prompts[2]))
    finish(batch)
    for row, prompt in zip(rows, prompts, strict=True):
        assert row.tokens[len(prompt) :] == completion(graph, prompt)
