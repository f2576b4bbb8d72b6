"""The two real models: graphs compared with transformers, and a patch that closes the gap on held-out queries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from runtime_tests.patches import random_config
from tp_export.fit import Settings, assemble, lockstep
from tp_export.measure import RuntimeStudent, TorchStudent, measure_fidelity
from tp_export.queries import load_questions
from tp_export.rollout import Prompting, dialogues_for
from tp_export.source import load_model, open_source
from tp_runtime.model import PatchedModel
from tp_runtime.session import Graph, ModelFolder

pytestmark = pytest.mark.real_model

PIRATE = "You are a pirate captain. Begin every answer with 'Arr, matey!' and speak only in pirate slang."

DIGESTS = {
    "smollm2": "06f09852fd9f84f09ebec7ad5eb1a628509292554869f66e1b9acbdf6bce7099",
    "gemma3": "b6497df305a462048aaa6dda998b5a66650c1d5421b0214fb080093af76a3727",
}


@pytest.fixture(params=["smollm2", "gemma3"])
def real(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A source folder and its export."""
    return request.getfixturevalue(request.param), request.getfixturevalue(f"{request.param}_export")


@pytest.mark.parametrize(("name", "digest"), DIGESTS.items())
def test_the_base_digest_is_that_of_earlier_versions(name: str, digest: str, request: pytest.FixtureRequest) -> None:
    """Patches name these digests: a version that computes others would refuse every patch made before."""
    source = open_source(request.getfixturevalue(name))
    assert source.tokenizer.reason is None
    assert source.digest == digest


def test_logits_match_transformers(real: tuple[Path, Path]) -> None:
    """The difference is below 1e-3 for 64 tokens in one run, and for a prompt and single tokens with the KV cache."""
    source, export = real
    graph = Graph(ModelFolder.open(export, verify=True), "cpu")
    ids = np.random.default_rng(0).integers(5, 40_000, 64).tolist()
    with torch.no_grad():
        wanted = load_model(open_source(source))(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    got = graph.forward(ids, graph.new_cache(graph.base), graph.base, all_logits=True)
    assert np.abs(got - wanted).max() < 1e-3
    cache = graph.new_cache(graph.base)
    steps = [graph.forward(ids[:40], cache, graph.base)] + [graph.forward([i], cache, graph.base) for i in ids[40:]]
    assert np.abs(np.concatenate(steps) - wanted[39:]).max() < 1e-3


def test_optimum_loads_the_exported_folder_unchanged(real: tuple[Path, Path]) -> None:
    from optimum.onnxruntime import ORTModelForCausalLM

    source, export = real
    ids = torch.tensor([open_source(source).codec.render("The weather today is")])
    got = ORTModelForCausalLM.from_pretrained(export).generate(ids, max_new_tokens=8, do_sample=False)
    wanted = load_model(open_source(source)).generate(ids, max_new_tokens=8, do_sample=False)
    assert got[0].tolist() == wanted[0].tolist()


def test_weights_are_stored_once(real: tuple[Path, Path]) -> None:
    """A tied embedding is not duplicated, so the data file is not larger than the source (to within 1%)."""
    source, export = real
    assert (export / "model.onnx_data").stat().st_size < 1.01 * (source / "model.safetensors").stat().st_size


def test_a_patch_closes_the_gap_on_held_out_queries(smollm2: Path, smollm2_export: Path) -> None:
    """Each form gets a quick fit (24 queries) and is measured through the exported graph if the graph has its slots."""
    source = open_source(smollm2)
    model = load_model(source)
    queries = load_questions(None)[:30]
    dialogues = dialogues_for(model, Prompting(source.codec, PIRATE), queries, 32)
    fitted, held_out = dialogues[:24], dialogues[24:]
    graph = Graph(ModelFolder.open(smollm2_export), "cpu")
    teacher, unpatched = TorchStudent(model), TorchStudent(model)
    gap_closed = {}
    for method in ("vector", "output", "matrix"):
        deltas, _ = lockstep.fit_lockstep(model, fitted, method, Settings(rank=16))
        patch = assemble(deltas, None, random_config(base_digest=source.digest, method=method), "f16")
        student = TorchStudent(model, patch) if method == "matrix" else RuntimeStudent(graph, patch)
        gap_closed[method] = measure_fidelity(held_out, teacher, unpatched, student).gap_closed
    assert gap_closed["output"] > 0.8 and gap_closed["matrix"] > 0.8
    assert gap_closed["vector"] < gap_closed["output"]


def test_chats_are_rendered_as_in_the_fit(smollm2: Path, smollm2_export: Path) -> None:
    """`generate` runs the same tokens as the fit, because the export has the tokenizer and template of the source."""
    source = open_source(smollm2)
    model = PatchedModel.from_pretrained(smollm2_export, device="cpu")
    for system in (None, PIRATE):
        assert model.codec.render("Who are you?", system) == source.codec.render("Who are you?", system)
    assert model.generate("What is the capital of France?", max_new_tokens=12) == "The capital of France is Paris."
