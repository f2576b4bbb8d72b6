"""A patch made at the edge compared with the exporter's: the same file, apart from rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.export.tiny import tiny_model
from runtime_tests.logits import furthest
from runtime_tests.patches import patch_for
from tp_export.fit import ALL, Recipe, make_patch
from tp_export.graph import export_model
from tp_export.queries import SystemMessages
from tp_export.source import Source, load_model, open_source
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch

SYSTEM = "Always talk like a pirate, and mention the sea in every single answer. " * 2
QUERIES = ["Is tea better than coffee?", "How far is the moon?", "Why?"]
DEFAULTED = (
    "{% if messages[0].role != 'system' %}<s>You are kind.</s>{% endif %}"
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
MIXED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


@pytest.fixture(scope="module", params=["chat", "a default system message", "completion", "full and windowed layers"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("source") / "m"
    if request.param == "full and windowed layers":
        return open_source(tiny_model(folder, "gemma3_text", chat=False, **MIXED))
    made = tiny_model(folder, "llama", chat=request.param != "completion")
    if request.param == "a default system message":
        (made / "chat_template.jinja").write_text(DEFAULTED)
    return open_source(made)


@pytest.fixture(scope="module")
def opened(source: Source, tmp_path_factory: pytest.TempPathFactory) -> PatchedModel:
    return PatchedModel.from_pretrained(export_model(source, tmp_path_factory.mktemp("edge") / "m"), "cpu")


def made_by_the_exporter(source: Source, model: Any) -> Patch:
    recipe = Recipe(method="prefix", prefix=ALL, dtype="f32", samples=1, max_new_tokens=4)
    return make_patch(source, model, SYSTEM, QUERIES[:2], QUERIES[2:], recipe, name="absorbed")


def test_a_patch_made_at_the_edge_is_the_exporters(source: Source, opened: PatchedModel) -> None:
    host, edge = made_by_the_exporter(source, load_model(source)), opened.absorb(SYSTEM)
    assert host.prefix is not None and edge.prefix is not None
    assert edge.prefix.counts == host.prefix.counts
    assert (edge.prefix.replaces, edge.prefix.position) == (host.prefix.replaces, host.prefix.position)
    for entry, values in host.prefix.entries.items():
        assert np.abs(edge.prefix.entries[entry] - values).max() < 1e-4, entry
    for key in ("name", "method", "base_model", "base_digest", "architecture", "precision", "context_digest", "stop"):
        assert getattr(edge.config, key) == getattr(host.config, key), key
    assert edge.capabilities == host.capabilities and edge.dtype == host.dtype
    for patch in (host, edge):
        assert opened.check(patch).ok
    for query in QUERIES:
        ids = opened.codec.render(query)
        assert furthest(opened.logits(ids, patch=edge), opened.logits(ids, patch=host)) < 1e-4


def test_a_prompt_in_front_of_system_messages_is_exact_and_the_exporters(source: Source, opened: PatchedModel) -> None:
    """The patch stands for the prompt and a blank line, whatever system message follows."""
    recipe = Recipe(method="prefix", prefix=ALL, dtype="f32", samples=1, max_new_tokens=4)
    systems = SystemMessages(("Be brief.", "Answer as a list."), ("You answer by telephone.",))
    host = make_patch(
        source, load_model(source), SYSTEM, QUERIES[:2], QUERIES[2:], recipe, name="absorbed", systems=systems
    )
    edge = opened.absorb(SYSTEM, before_system=True)
    assert host.prefix is not None and edge.prefix is not None
    assert host.prefix.before_system and edge.prefix.before_system
    assert (edge.prefix.replaces, edge.prefix.position) == (host.prefix.replaces, host.prefix.position)
    assert edge.capabilities == host.capabilities
    for patch in (host, edge):
        assert opened.check(patch).ok
        for own in ("Be brief.", "7 words.", "«Oui»"):
            for query in QUERIES:
                got = opened.logits(opened.codec.render(query, own), patch=patch)
                wanted = opened.logits(opened.codec.render(query, f"{SYSTEM}\n\n{own}"))
                assert furthest(got, wanted[-len(got) :]) < 1e-4


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4-rtn", "int4-rtn-fp16"])
def test_a_patch_belongs_to_the_precision_that_it_was_made_on(
    precision: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = open_source(tiny_model(tmp_path / "m", "llama", hidden_size=64, intermediate_size=128))
    model = PatchedModel.from_pretrained(export_model(source, tmp_path / "edge", precision=precision), "cpu")
    patch = model.absorb(SYSTEM, patch=None)
    assert patch.config.precision == precision.removesuffix("-fp16")  # int4-rtn-fp16 has the weights of int4-rtn
    assert patch.dtype == ("f16" if precision.endswith("fp16") else "f32")
    patch.save(tmp_path / "p.safetensors")
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded.identity == patch.identity and model.check(loaded).ok
    tolerance = {"fp16": 0.05, "int8": 0.2, "int4-rtn": 0.2, "int4-rtn-fp16": 0.05}[precision]
    for query in QUERIES:
        got = model.logits(model.codec.render(query), patch=loaded)
        wanted = model.logits(model.codec.render(query, SYSTEM))[-len(got) :]
        assert furthest(got, wanted) < tolerance
    weights = patch_for(model.graph.folder, seed=1, scale=0.1)
    assert model.absorb(SYSTEM, patch=weights).capabilities.form == "weights and entries"
