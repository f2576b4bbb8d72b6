"""`tp-export report`: its measurements compared with direct formulas, the page, the summary in the file, bad input."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tp_export.cli import main as tp_export_main
from tp_export.decoder import patched
from tp_export.fit import ALL, Recipe, make_patch
from tp_export.measure import TorchStudent, diverge, measure_fidelity, with_prompt, without_prompt
from tp_export.queries import load_questions
from tp_export.report import compare, costs, describe_report, measure, running, store_summary
from tp_export.report.figures import Fits, PatchReport, Report, Turns
from tp_export.report.page import render_page
from tp_export.rollout import Dialogue, Prompting, dialogues_for
from tp_export.source import load_model, open_source
from tp_runtime.patch import Patch
from tp_runtime.session import Graph, ModelFolder

PIRATE = "Always talk like a pirate, and mention the sea in every single answer."
FRENCH = "Answer in French."
QUERIES = [
    "Is tea better than coffee?",
    "How far is the moon?",
    "What is a <b>tag</b>?",
    "Who sells lamps?",
    "Why do cats purr?",
]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("queries") / "held.txt"
    file.write_text("\n".join(QUERIES))
    return file


@pytest.fixture(scope="module")
def files(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("patches")
    made = []
    for name, prompt in (("pirate", PIRATE), ("french", FRENCH)):
        made.append(folder / f"{name}.safetensors")
        options = ["--limit=6", "--holdout=0", "--max-new-tokens=6", "--rank=4"]
        assert tp_export_main(["patch", str(tiny_llama), str(made[-1]), "--prompt", prompt, *options]) == 0
    return made


def arguments(source: Path, patches: list[Path], held_out: Path, out: Path, *more: str) -> list[str]:
    return [
        *("report", str(source), *map(str, patches), "--prompt", PIRATE, "--queries", str(held_out)),
        *("-o", str(out), "--max-new-tokens", "6", "--long", "8", *more),
    ]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return load_model(open_source(tiny_llama))


@pytest.fixture(scope="module")
def report(files: list[Path], tiny_llama: Path, tiny_llama_export: Path, model: Any) -> Report:
    """The full report of two patches; measurements of the runtime use the exported graph."""
    graph = Graph(ModelFolder.open(tiny_llama_export), "cpu")
    setup = measure.Setup(open_source(tiny_llama), model, graph, 6, 8, compare.METHODS, (2, 8))
    subjects = []
    for file, prompt in zip(files, (PIRATE, FRENCH), strict=True):
        patch = Patch.load(file)
        fitted = compare.fitted_queries(patch, load_questions(None))
        subjects.append(measure.Subject(patch, file, prompt, QUERIES, fitted))
    parts = [measure.measure_patch(setup, subject) for subject in subjects]
    return describe_report(setup, parts, measure.measure_composition(setup, subjects))


@pytest.fixture(scope="module")
def whole(report: Report) -> tuple[dict[str, Any], str]:
    """The JSON and the page of the report."""
    return json.loads(json.dumps(report.to_dict())), render_page(report)


@pytest.fixture(scope="module")
def dialogues(tiny_llama: Path, model: Any) -> list[Dialogue]:
    return dialogues_for(model, Prompting(open_source(tiny_llama).codec, PIRATE), QUERIES, 6)


# -- measurements --------------------------------------------------------------------------------------------


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


# -- the page ------------------------------------------------------------------------------------------------

SECTIONS = (
    *("The four variants", "Along the answer", "Long answers", "Dialogues", "Layers"),
    *("Strength", "Against the heuristics", "Answers", "The worst answers", "Their sum", "How it was measured"),
)


class _Page(HTMLParser):
    """A parser that collects open tags, titles, and every attribute that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        assert tag not in ("script", "link", "img", "iframe", "object", "embed")
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h2", "h3"):
            self.titles.append(data)


def test_the_page_is_complete_and_loads_nothing(whole: tuple[dict[str, Any], str]) -> None:
    page = _Page()
    page.feed(whole[1])
    assert page.open == [] and set(SECTIONS) <= set(page.titles)
    assert all(reference.startswith("#") for reference in page.references)
    addresses = set(re.findall(r"https?://[^\"'\s)<]+", whole[1]))
    assert addresses <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }  # these are names of XML namespaces, which nothing loads
    assert not re.search(r"url\((?!#)", whole[1]) and "@import" not in whole[1]
    ids = re.findall(r'clipPath id="([^"]+)"', whole[1])
    assert whole[1].count("<svg") == 14 and len(ids) >= 12


def test_markup_in_queries_is_escaped(whole: tuple[dict[str, Any], str]) -> None:
    assert "<b>tag</b>" not in whole[1] and "&lt;b&gt;tag&lt;/b&gt;" in whole[1]


def test_missing_measurements_are_explained(report: Report) -> None:
    one = report.patches[0]
    variants = [replace(variant, first_token_ms=None, token_ms=None) for variant in one.variants]
    fits = Fits(0, 0, False, [], "left out with --baselines none")
    turns = Turns(0, 64, [], {}, "the model is completion-style, so it has no chat turns")
    layers = [replace(layer, retained={}) for layer in one.layers]
    reduced = replace(one, variants=variants, fits=fits, turns=turns, layers=layers, long=None)
    text = render_page(replace(report, patches=[reduced], composition=[], runtime=None))
    for message in ("--runtime)", "--baselines none", "it has no chat turns", "The energy kept is not known"):
        assert message in text
    assert "Long answers" not in text and "Their sum" not in text


def without_plots(patch: PatchReport, **more: Any) -> PatchReport:
    """Return a report with changed figures and few plots, so that the page is quickly drawn."""
    nothing = Turns(0, 64, [], {}, "left out"), Fits(0, 0, False, [], "left out")
    left_out: dict[str, Any] = {"turns": nothing[0], "fits": nothing[1], "layers": [], "sweep": None, "long": None}
    return replace(patch, **left_out, frontier=None, **more)


def test_the_page_states_the_answers_kept_and_the_stop(report: Report) -> None:
    one = report.patches[0]
    variants = [replace(v, held_out=replace(v.held_out, right=0.5, kept=0.8125, kept_se=0.0421)) for v in one.variants]
    text = render_page(replace(report, patches=[without_plots(one, variants=variants, known_answers=3, stop=["\n<"])]))
    assert "of the prompted model's right answers are kept ± 4.2" in " ".join(text.split())
    assert "81.2\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}4.2" in text and "equals the expected one up to the stop" in text
    assert '<code>"\\n\\u003c"</code>' in text
    nothing = [replace(v, held_out=replace(v.held_out, right=0.0, kept=None, kept_se=None)) for v in one.variants]
    text = render_page(replace(report, patches=[without_plots(one, variants=nothing, known_answers=3)]))
    assert "gives no right answer that could be" in text and "contains the expected text" in text


def test_the_page_states_that_the_prompt_has_no_effect_on_the_first_token(report: Report) -> None:
    one = report.patches[0]
    variants = [
        replace(v, held_out=replace(v.held_out, gap_closed_first=None, gap_closed_first_se=None)) for v in one.variants
    ]
    text = " ".join(render_page(replace(report, patches=[without_plots(one, variants=variants)])).split())
    assert "the prompt has no effect on the first token of the answers" in text


def test_a_completion_style_model_has_no_chat_turns(tiny_gemma: Path, files: list[Path], model: Any) -> None:
    source = open_source(tiny_gemma)
    asked = Prompting(source.codec, PIRATE)
    found = running.measure_turns(source, model, asked, Patch.load(files[0]), QUERIES, ["Why?"], 8)
    assert found.turns == [] and "it has no chat turns" in found.why_not


# -- the summary in the file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "i8"])
def test_the_summary_is_stored_and_nothing_else_changes(
    dtype: str, report: Report, files: list[Path], tmp_path: Path, cli: Any
) -> None:
    file = tmp_path / "p.safetensors"
    Patch.load(files[0]).save(file, dtype)
    before, size = Patch.load(file), file.stat().st_size
    store_summary(file, before, report.patches[0])
    after = Patch.load(file)
    assert after.identity == before.identity and after.config.probe == before.config.probe
    assert file.stat().st_size - size < 2000
    assert after.config.report is not None and after.config.report["queries"] == len(QUERIES)
    assert {"gap_closed", "unrelated_text_kl", "ends_turn", "gap_closed_turn_3"} <= set(after.config.report)
    beside = {"gap_closed_se", "gap_closed_first", "gap_closed_first_se", "top1_agreement", "top1_agreement_first"}
    assert beside <= set(after.config.report)
    assert (0.5 * after).config.report is None and after.truncate(2).config.report is None
    assert f"gap_closed {after.config.report['gap_closed']:.4g}" in cli("inspect", file).out
    assert cli("inspect", file, "--json").json["report"] == after.config.report


def test_the_command_writes_prints_and_stores(
    files: list[Path], held_out: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = Path(shutil.copy(files[0], tmp_path / "p.safetensors")), tmp_path / "r.html"
    more = ("--baselines", "none", "--long", "0", "--store", "--json")
    assert tp_export_main(arguments(tiny_llama, [file], held_out, out, *more)) == 0
    figures = json.loads(capsys.readouterr().out)
    assert "--runtime)" in out.read_text() and figures["runtime"] is None
    stored = Patch.load(file)
    assert stored.config.report is not None and stored.identity == figures["patches"][0]["identity"]
    assert stored.config.report["gap_closed"] == pytest.approx(
        figures["patches"][0]["variants"][3]["held_out"]["gap_closed"], abs=1e-5
    )
    assert "ends_turn" not in stored.config.report and "first_token_ms" not in stored.config.report


def test_a_fit_with_other_tensors_is_recognised_as_another(files: list[Path]) -> None:
    p, q = map(Patch.load, files)
    assert compare.same_tensors(p, p) and not compare.same_tensors(p, q)
    assert not compare.same_tensors(p, 1.02 * p) and not compare.same_tensors(p, p.truncate(2))


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "field"),
    [
        (["--prompt", FRENCH], "--prompt"),
        (["--queries", "HELD", "--queries", "HELD"], "--queries"),
        (["--baselines", "output,magic"], "--baselines"),
        (["--long", "-1"], "--long"),
        (["--frontier", "4,x"], "--frontier"),
        (["--frontier-ranks", "0"], "--frontier-ranks"),
        (["--stop", ""], "--stop"),
        (["--long", "100000"], "--long"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["-o", "nowhere/r.html"], "-o"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    more: list[str], field: str, files: list[Path], held_out: Path, tiny_llama: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "r.html"
    more = [str(held_out) if word == "HELD" else word for word in more]
    assert tp_export_main(arguments(tiny_llama, files[:1], held_out, out, *more)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and f"error: {field}: " in captured.err and "got" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_fitted_queries_and_a_repeated_patch_are_refused(
    files: list[Path], held_out: Path, tiny_llama: Path, tmp_path: Path, capsys: Any
) -> None:
    fitted = tmp_path / "fitted.txt"
    fitted.write_text(load_questions(None)[0])
    assert tp_export_main(arguments(tiny_llama, files[:1], fitted, tmp_path / "r.html")) == 2
    assert "held-out queries are also among the fitted ones" in capsys.readouterr().err
    copy = shutil.copy(files[0], tmp_path / "copy.safetensors")
    both = arguments(tiny_llama, [files[0], Path(copy)], held_out, tmp_path / "r.html", "--prompt", FRENCH)
    assert tp_export_main(both) == 2
    assert "the same patch is given twice" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_fitted_queries_that_cannot_be_found_give_an_empty_list(files: list[Path], tmp_path: Path) -> None:
    patch = Patch.load(files[0])
    assert compare.fitted_queries(patch, ["Something else?"]) == []
    without = replace(patch, config=replace(patch.config, calibration=None))
    assert compare.fitted_queries(without, ["Something else?"]) == []


def test_a_missing_plotting_library_is_an_error_with_the_fix(
    files: list[Path], held_out: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert tp_export_main(arguments(tiny_llama, files[:1], held_out, tmp_path / "r.html")) == 1
    assert "pip install 'tp-runtime[export,report]'" in capsys.readouterr().err


def test_hooks_are_removed_afterwards(whole: tuple[dict[str, Any], str], model: Any, files: list[Path]) -> None:
    ids = torch.tensor([[1, 5, 9]])
    before = model(ids).logits
    with patched(model, Patch.load(files[0])):
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
