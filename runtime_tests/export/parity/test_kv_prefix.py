"""The edge half compared with torch: KV prefixes. A prefix of all entries is the cached prompt and is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime_tests.export.entries import all_entries, some_entries
from runtime_tests.export.torch_logits import torch_logits
from runtime_tests.logits import furthest, token_ids
from runtime_tests.patches import patch_for
from tp_export.decoder import torch_prefix
from tp_export.fit import ALL, Recipe, make_patch
from tp_export.formats import control_vector, peft_out
from tp_export.formats import onnx_adapter as genai
from tp_export.measure import TorchStudent
from tp_export.rollout import Dialogue, Prompting, check_beginning
from tp_export.source import load_model, open_source
from tp_runtime.errors import (
    CalibrationError,
    PatchShapeError,
    PatchTargetError,
    PatchValueError,
    StaleCacheError,
)
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch

CONTEXT = "Always talk like a pirate, and mention the sea in every single answer."
QUERIES = ("Is tea better than coffee?", "How far is the moon?", "Why?")
TOLERANCE = 2e-2  # entries are stored in half precision


@pytest.fixture(scope="module", params=["llama", "gemma"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, PatchedModel]:
    """A torch model, and the runtime's model of its export."""
    source, export = (request.getfixturevalue(f"tiny_{request.param}{end}") for end in ("", "_export"))
    return load_model(open_source(source)), PatchedModel.from_pretrained(export, device="cpu")


def dialogues(model: PatchedModel) -> list[Dialogue]:
    render = model.codec.render
    return [Dialogue(tuple(render(q, CONTEXT)), tuple(render(q)), tuple(token_ids(9, seed=7))) for q in QUERIES]


def prefixed(torch_model: Any, model: PatchedModel, entries: int | None, patch: Patch | None = None) -> Patch:
    """Return a patch with some entries of the context, or all; `patch` gives it its deltas."""
    found = dialogues(model)
    prefix = all_entries(torch_model, found) if entries is None else some_entries(torch_model, found, entries)
    deltas = {} if patch is None else patch.deltas
    return Patch(deltas, patch_for(model.graph.folder, seed=1).config, prefix.numpy())


def test_a_prefix_of_all_entries_equals_the_cached_prompt(pair: tuple[Any, PatchedModel]) -> None:
    torch_model, model = pair
    whole = prefixed(torch_model, model, None)
    assert whole.prefix is not None
    for dialogue in dialogues(model):
        wanted = torch_logits(torch_model, dialogue.teacher())[whole.prefix.position :]
        got = model.logits(dialogue.student(), patch=whole)
        assert furthest(got, wanted) < TOLERANCE
        without = model.logits(dialogue.student(), patch=None)
        assert furthest(without[-len(wanted) :], wanted) > 10 * TOLERANCE  # otherwise the context has no effect


@pytest.mark.parametrize("entries", [1, 5])
def test_some_entries_together_with_deltas_match_torch(pair: tuple[Any, PatchedModel], entries: int) -> None:
    torch_model, model = pair
    patch = prefixed(torch_model, model, entries, patch_for(model.graph.folder, seed=2, scale=0.2))
    assert patch.prefix is not None and patch.prefix.longest == entries
    ids = list(dialogues(model)[0].student())
    lead = len(patch.prefix.replaces)
    wanted = TorchStudent(torch_model, patch)(ids, lead).numpy()
    assert furthest(model.logits(ids, patch=patch), wanted) < 1e-3
    # The same holds on a growing cache, and again after the cache was rewound.
    bound = model.graph.bind(patch)
    cache = model.graph.new_cache(bound)
    for _ in range(2):
        kept = cache.keep_prefix(ids)
        rows = [model.graph.forward([token], cache, bound)[0] for token in ids[kept:]]
        assert furthest(np.stack(rows), wanted[-len(rows) :]) < 1e-3
        del cache.tokens[lead + 3 :]


def test_generation_uses_the_prefix_and_can_continue_on_a_cache(pair: tuple[Any, PatchedModel]) -> None:
    torch_model, model = pair
    patch = prefixed(torch_model, model, None)
    prompted = list(model.stream("Hello", system=CONTEXT, patch=None, max_new_tokens=6))
    cache = model.new_cache(patch=patch)
    assert list(model.stream("Hello", patch=patch, max_new_tokens=6, cache=cache)) == prompted
    # The second request rewinds the cache.
    assert list(model.stream("Hello", patch=patch, max_new_tokens=6, cache=cache)) == prompted
    with pytest.raises(StaleCacheError):
        model.generate("Hello", patch=None, cache=cache)


def test_prefixes_of_another_model_are_refused_when_bound(pair: tuple[Any, PatchedModel]) -> None:
    torch_model, model = pair
    patch = prefixed(torch_model, model, 3)
    assert patch.prefix is not None
    far, foreign = replace(patch.prefix, position=10**9), replace(patch.prefix, replaces=(10**6,))
    for prefix, error in ((far, PatchShapeError), (foreign, PatchValueError)):
        with pytest.raises(error, match=r"config\.prefix"):
            model.load_patch(Patch({}, patch.config, prefix))
        with pytest.raises(error, match=r"config\.prefix"):
            TorchStudent(torch_model, Patch({}, patch.config, prefix))
    huge = {entry: np.full_like(values, 1e5) for entry, values in patch.prefix.entries.items()}
    with pytest.raises(PatchValueError, match="does not fit the cache's precision"):
        replace(patch.prefix, entries=huge).check_dtype(np.float16)


def test_prompts_that_entries_cannot_replace_are_refused_before_the_rollout(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(tiny_llama)
    beginning = check_beginning(source.codec, Prompting(source.codec, CONTEXT).pairs(QUERIES))
    for query in QUERIES:
        teacher, student = source.codec.render(query, CONTEXT), source.codec.render(query)
        assert (*beginning.teacher, *student[len(beginning.student) :]) == tuple(teacher)
    monkeypatch.setattr(source.codec, "template_source", "{{ strftime_now('%d %b') }}")
    with pytest.raises(CalibrationError, match="writes the date"):
        check_beginning(source.codec, Prompting(source.codec, CONTEXT).pairs(QUERIES))


def test_formats_that_contain_only_weights_refuse_a_prefix(pair: tuple[Any, PatchedModel], tmp_path: Path) -> None:
    torch_model, model = pair
    patch = prefixed(torch_model, model, 4, patch_for(model.graph.folder, seed=3))
    for write in (
        lambda: peft_out.pairs(patch, {}),
        lambda: control_vector.control_vector_parts(patch),
        lambda: genai.write_onnx_adapter(patch, model.graph.folder, tmp_path / "p.onnx_adapter"),
    ):
        with pytest.raises(PatchTargetError, match="only weights travel to other formats"):
            write()
    assert not list(tmp_path.iterdir())


def test_prompts_without_one_fixed_beginning_cannot_have_entries() -> None:
    """A template that puts the context behind the query gives every query a beginning of its own."""
    codec = SimpleNamespace(render=lambda query, context=None: [1, *query.encode(), *(context or "").encode(), 3, 4])
    with pytest.raises(CalibrationError, match=r"one fixed beginning.*got 2 different beginnings.*--prefix 0"):
        check_beginning(codec, Prompting(codec, CONTEXT).pairs(["How?", "Why"]))


def test_make_patch_fits_the_weights_with_the_prefix_in_place(tiny_llama: Path) -> None:
    source = open_source(tiny_llama)
    model = load_model(source)
    held = ["Is the sea deep?", "Who are you?"]
    gaps = {}
    for entries, method in ((0, "output"), (8, "prefix"), (8, "output"), (ALL, "prefix")):
        recipe = Recipe(method=method, prefix=entries, max_new_tokens=6)
        patch = make_patch(source, model, CONTEXT, QUERIES, held, recipe, name="p")
        assert patch.config.fidelity is not None and patch.config.probe is not None
        gaps[entries, method] = patch.config.fidelity["gap_closed"]
        assert torch_prefix(patch, model) is None if not entries else patch.prefix is not None
    assert gaps[ALL, "prefix"] > 0.99 and gaps[8, "prefix"] > 0.3
    assert gaps[8, "output"] > max(gaps[8, "prefix"], gaps[0, "output"])
