"""The measurements of `tp-export report`, compared with direct formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tp_export.decoder import patched
from tp_export.fit import ALL, Recipe, make_patch
from tp_export.measure import TorchStudent, diverge, measure_fidelity, with_prompt, without_prompt
from tp_export.report import compare, costs, describe_report, measure, running, store_summary
from tp_export.report.page import render_page
from tp_export.rollout import Dialogue, Prompting
from tp_export.source import load_model, open_source
from tp_runtime.patch import Patch
from tp_runtime.session import Graph, ModelFolder

from .conftest import PIRATE, QUERIES


def test_divergence_equals_that_of_evaluate(model: Any, dialogues: list[Dialogue], files: list[Path]) -> None:
    patch = Patch.load(files[0])
    plain, student = TorchStudent(model), TorchStudent(model, patch)
    wanted = measure_fidelity(dialogues, plain, plain, student)
    found = diverge(dialogues, with_prompt(plain), {"patch": without_prompt(student)})["patch"]
    assert found.mean == pytest.approx(wanted.kl_patched, rel=1e-5)
    assert found.top1 == pytest.approx(wanted.top1_agreement)


def test_the_divergence_by_position_averages_to_the_total(model: Any, dialogues: list[Dialogue]) -> None:
    plain = TorchStudent(model)
    found = diverge(dialogues, with_prompt(plain), {"plain": without_prompt(plain), "self": with_prompt(plain)})
    for width in (1, 4, 100):
        means, tokens = found["plain"].by_position(width)
        assert sum(tokens) == sum(len(d.completion) for d in dialogues)
        assert np.average(means, weights=tokens) == pytest.approx(found["plain"].mean)
    assert found["self"].mean == pytest.approx(0, abs=1e-6) and found["self"].top1 == 1


def test_the_variants_have_consistent_figures(whole: tuple[dict[str, Any], str], files: list[Path]) -> None:
    report = whole[0]["patches"][0]
    variants = {variant["name"]: variant for variant in report["variants"]}
    assert list(variants) == ["no prompt", "prompt", "prompt, cached prefix", "patch"]
    held = {name: variant["held_out"] for name, variant in variants.items()}
    assert held["no prompt"]["gap_closed"] == held["no prompt"]["gap_closed_se"] == 0
    assert held["no prompt"]["gap_closed_first"] == 0 and variants["no prompt"]["text_kl"] == 0
    for exact in ("prompt", "prompt, cached prefix"):  # measured through the graph and compared with torch
        assert held[exact]["kl"] < 1e-4 * held["no prompt"]["kl"]
        assert held[exact]["gap_closed_first"] > 0.999 and held[exact]["top1_agreement_first"] == 1
    assert held["patch"]["gap_closed_se"] > 0 and held["patch"]["right"] is None  # no answer is known
    assert variants["patch"]["shared_bytes"] == files[0].stat().st_size
    assert variants["prompt"]["session_bytes"] > 0 == variants["patch"]["session_bytes"]
    assert all(variant["first_token_ms"] > 0 and variant["token_ms"] > 0 for variant in variants.values())
    assert all(variants[name]["text_kl"] > 0 for name in ("prompt", "patch"))
    curve = report["positions"]
    assert np.average(curve["patched"], weights=curve["tokens"]) == pytest.approx(held["patch"]["kl"])


def test_strength_zero_gives_the_base_and_one_gives_the_patch(
    model: Any, dialogues: list[Dialogue], whole: tuple[dict[str, Any], str], files: list[Path]
) -> None:
    strengths = {s["strength"]: s for s in whole[0]["patches"][0]["sweep"]["strengths"]}
    assert set(strengths) == set(measure.STRENGTHS)
    plain = TorchStudent(model)
    arms = {
        0.0: without_prompt(plain),
        1.0: without_prompt(TorchStudent(model, Patch.load(files[0]))),
    }
    found = diverge(dialogues[:4], with_prompt(plain), {str(s): arm for s, arm in arms.items()})
    for strength in arms:
        assert strengths[strength]["kl"] == pytest.approx(found[str(strength)].mean, rel=1e-4)
    assert all(0 < s["distinct"] <= 1 for s in strengths.values())


def test_switching_a_layer_off_equals_a_patch_without_that_layer(
    model: Any, dialogues: list[Dialogue], files: list[Path]
) -> None:
    patch = Patch.load(files[0])
    measured = {layer.layer: layer for layer in measure.layer_effects(model, patch, dialogues, {1: {"mlp_out": 0.5}})}
    assert set(measured) == {0, 1, 2} and measured[1].retained == {"mlp_out": 0.5}
    handmade = Patch({slot: d for slot, d in patch.deltas.items() if slot[0] in (0, 2)}, patch.config)
    plain = TorchStudent(model)
    arms = {"off": handmade, "on": patch, "none": None}
    found = diverge(
        dialogues,
        with_prompt(plain),
        {name: without_prompt(TorchStudent(model, p)) for name, p in arms.items()},
    )
    assert measured[1].kl_without == pytest.approx(found["off"].mean, rel=1e-5)
    lost = (found["off"].mean - found["on"].mean) / found["none"].mean
    assert measured[1].share == pytest.approx(lost, rel=1e-4)


def test_a_patch_with_a_prefix_is_reported(files: list[Path], tiny_llama: Path, model: Any, tmp_path: Path) -> None:
    """The report of such a patch has no strengths, and its answers are those of the prompt."""
    source = open_source(tiny_llama)
    recipe = Recipe(prefix=ALL, method="prefix", max_new_tokens=6, samples=1)
    patch = make_patch(source, model, PIRATE, ["Hello?", "Who is there?"], QUERIES, recipe, name="prefix")
    file = tmp_path / "prefix.safetensors"
    patch.save(file)
    setup = measure.Setup(source, model, None, 6, 8, ())
    found = measure.measure_patch(setup, measure.Subject(patch, file, PIRATE, QUERIES, []))
    assert found.sweep is None and found.frontier is None and found.layers == []
    assert [answer.patch for answer in found.answers] == [answer.prompt for answer in found.answers]
    page = render_page(describe_report(setup, [found], []))
    assert "has no strengths" in page and f"prefix, {found.entries[0]} entries per head, identity" in page
    store_summary(file, Patch.load(file), found)
    stored = Patch.load(file)
    assert stored.config.report is not None and stored.identity == patch.identity and stored.prefix is not None


def test_the_repeated_fit_reports_the_energy_that_its_rank_keeps(whole: tuple[dict[str, Any], str]) -> None:
    for report in whole[0]["patches"]:
        fits = report["fits"]
        assert fits["exact"] and fits["queries"] == 6
        methods = {m["method"]: m for m in fits["methods"]}
        assert set(methods) == set(compare.METHODS)
        variants = {variant["name"]: variant for variant in report["variants"]}
        assert methods["output"]["closeness"]["kl"] == pytest.approx(variants["patch"]["held_out"]["kl"], rel=2e-2)
        assert all(0 < layer["retained"]["mlp_out"] <= 1 for layer in report["layers"])
        assert methods["steering"]["bytes"] < methods["output"]["bytes"]


def test_a_fit_with_other_tensors_is_recognised_as_another(files: list[Path]) -> None:
    p, q = map(Patch.load, files)
    assert compare.same_tensors(p, p) and not compare.same_tensors(p, q)
    assert not compare.same_tensors(p, 1.02 * p) and not compare.same_tensors(p, p.truncate(2))


def test_fitted_queries_that_cannot_be_found_give_an_empty_list(files: list[Path], tmp_path: Path) -> None:
    patch = Patch.load(files[0])
    assert compare.fitted_queries(patch, ["Something else?"]) == []
    without = replace(patch, config=replace(patch.config, calibration=None))
    assert compare.fitted_queries(without, ["Something else?"]) == []


@torch.no_grad()
def test_a_full_rank_keeps_all_the_energy(model: Any, dialogues: list[Dialogue]) -> None:
    from tp_export.fit import Settings, fit_lockstep

    kept = {
        rank: fit_lockstep(model, dialogues, "output", Settings(rank))[0][0]["mlp_out"].retained for rank in (1, 8, 64)
    }
    assert kept[1] is not None and kept[8] is not None and kept[1] < kept[8] < 1.0001
    assert kept[64] == pytest.approx(1, abs=1e-9)


def test_free_running_answers_equal_those_of_generate(
    whole: tuple[dict[str, Any], str], tiny_llama: Path, model: Any
) -> None:
    """The free-running answers in the report equal those of transformers' `generate`."""
    source = open_source(tiny_llama)
    report = whole[0]["patches"][1]
    answer = report["answers"][0]
    ids = torch.tensor([source.codec.render(answer["query"])])
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
    assert answer["no_prompt"] == source.codec.decode(plain.tolist()).strip()
    assert len(report["worst"]) == 2  # three of the five are shown as examples
    assert report["worst"][0]["kl"] >= report["worst"][1]["kl"]


def test_endings_and_repetitions_are_counted(tiny_llama: Path) -> None:
    source = open_source(tiny_llama)
    found = running.endings(source, {"patch": [(5, 6, 2), (2,), (7, 8, 9, 10)]})[0]
    assert (found.ended, found.silent, found.tokens) == (
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
        pytest.approx(8 / 3),
    )
    assert running.distinct([(1, 2, 3, 4), (1, 2, 3, 4)]) == 1.0
    assert running.distinct([(1, 1, 1, 1, 1)]) == pytest.approx(1 / 3)


def test_dialogues_have_three_chat_turns(whole: tuple[dict[str, Any], str]) -> None:
    turns = whole[0]["patches"][0]["turns"]
    assert [turn["turn"] for turn in turns["turns"]] == [1, 2, 3]
    assert [role for role, _ in turns["shown"]["patch"]] == ["user", "assistant"] * 3
    assert turns["shown"]["patch"][0][1] == QUERIES[0]


def test_a_completion_style_model_has_no_chat_turns(tiny_gemma: Path, files: list[Path], model: Any) -> None:
    source = open_source(tiny_gemma)
    asked = Prompting(source.codec, PIRATE)
    found = running.measure_turns(source, model, asked, Patch.load(files[0]), QUERIES, ["Why?"], 8)
    assert found.turns == [] and "it has no chat turns" in found.why_not


def test_a_composition_is_measured_on_the_sum_of_patches(
    whole: tuple[dict[str, Any], str], model: Any, dialogues: list[Dialogue], files: list[Path]
) -> None:
    p, q = map(Patch.load, files)
    plain = TorchStudent(model)
    arms = {name: without_prompt(TorchStudent(model, x)) for name, x in {"q": q, "p+q": p + q}.items()}
    found = diverge(dialogues, with_prompt(plain), {"none": without_prompt(plain), **arms})
    row = whole[0]["composition"][0]
    row = {name: row[name]["gap_closed"] for name in ("alone", "others", "together")}
    assert row["others"] == pytest.approx(1 - found["q"].mean / found["none"].mean, rel=1e-3)
    assert row["together"] == pytest.approx(1 - found["p+q"].mean / found["none"].mean, rel=1e-3)
    assert row["alone"] == pytest.approx(whole[0]["patches"][0]["variants"][3]["held_out"]["gap_closed"], rel=1e-3)


@torch.no_grad()
def test_a_cached_prefix_does_not_change_the_logits(
    tiny_llama_export: Path, model: Any, dialogues: list[Dialogue]
) -> None:
    graph = Graph(ModelFolder.open(tiny_llama_export), "cpu")
    shared = costs.shared_prefix([d.teacher_prompt for d in dialogues])
    assert len({d.teacher_prompt[:shared] for d in dialogues}) == 1
    assert len({d.teacher_prompt[: shared + 1] for d in dialogues}) > 1
    arm = costs.CachedPrefixArm(graph, dialogues[0].teacher_prompt[:shared])
    for d in dialogues:
        wanted = model(torch.tensor([d.teacher()])).logits[0, len(d.teacher_prompt) - 1 :]
        assert torch.allclose(arm(d), wanted, atol=1e-3)
    assert costs.kv_token_bytes(graph, model) == costs.kv_token_bytes(None, model)


@pytest.mark.usefixtures("whole")
def test_a_report_and_a_patched_model_remove_their_hooks(model: Any, tiny_llama: Path, files: list[Path]) -> None:
    ids = torch.tensor([[1, 5, 9]])
    before = load_model(open_source(tiny_llama))(ids).logits
    with patched(model, Patch.load(files[0])):
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
