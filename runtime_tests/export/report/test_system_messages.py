"""Reports on patches that stand in front of a system message that each query has of its own (`--before-system`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.export.tiny import tiny_model
from tp_export.cli import main
from tp_export.fit import make_patch
from tp_export.measure import TorchStudent, diverge, measure_closeness, with_prompt, without_prompt
from tp_export.queries import SystemMessages, load_system_messages
from tp_export.report import Setup, Subject, check_long, frontier, locality, running
from tp_export.report.figures import SHORTER
from tp_export.report.known import Known
from tp_export.rollout import Prompting, RolloutStore, dialogues_for
from tp_export.source import Source, load_model, open_source
from tp_runtime.errors import RequestError
from tp_runtime.patch import Patch

POLICY = "Rooms open at nine. Nobody smokes. Keys are at the desk. " * 3
FITTED = [f"Who is number {number}?" for number in range(5)]
QUERIES = ["Where is the key?", "Who smokes?", "When do rooms open?", "Is it late?", "What is this?"]
MESSAGES = [
    "Be brief.",
    "Be kind.",
    "Be exact.",
    "You rhyme.",
    "Be loud.",
    "Be slow.",
    "You answer by telephone.",
    "Hm.",
]
SYSTEMS = SystemMessages(tuple(MESSAGES[:6]), tuple(MESSAGES[6:]))

pytest.importorskip("matplotlib")


def behind(folder: Path) -> list[str]:
    return ["--before-system", "--system-messages", str(folder / "systems.txt")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source, the patches and the texts that the commands read."""
    folder = tmp_path_factory.mktemp("systems")
    source = tiny_model(folder / "source", "llama")
    (folder / "systems.txt").write_text("".join(f"{message}\n" for message in MESSAGES))
    (folder / "fitted.txt").write_text("".join(f"{query}\n" for query in FITTED))
    (folder / "held.txt").write_text("".join(f"{query}\n" for query in QUERIES))
    forms = {
        "entries": ("--prefix", "6", *behind(folder)),
        "weights": ("--rank", "2", *behind(folder)),
        "in-place": ("--prefix", "6"),
    }
    for name, options in forms.items():
        arguments = ["patch", str(source), str(folder / f"{name}.safetensors"), "--prompt", POLICY, *options]
        sizes = ["--queries", str(folder / "fitted.txt"), "--holdout", "0", "--max-new-tokens", "4", "--samples", "1"]
        assert main([*arguments, *sizes]) == 0
    return folder


def command(name: str, folder: Path, patches: list[str], *more: str) -> list[str]:
    files = [str(folder / f"{patch}.safetensors") for patch in patches]
    prompts = [word for _ in patches for word in ("--prompt", POLICY)]
    held = ["--queries", str(folder / "held.txt"), "--max-new-tokens", "4", "--json"]
    return [name, str(folder / "source"), *files, *prompts, *held, *more]


def report(folder: Path, patches: list[str], page: Path, *more: str) -> list[str]:
    return command("report", folder, patches, "-o", str(page), "--long", "6", *more)


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return open_source(folder / "source")


@pytest.fixture(scope="module")
def model(source: Source) -> Any:
    return load_model(source)


@pytest.fixture(scope="module")
def asked(source: Source) -> Prompting:
    """How the held-out queries are asked."""
    return Prompting(source.codec, POLICY, SYSTEMS.held_out)


def subject(folder: Path, name: str) -> Subject:
    file = folder / f"{name}.safetensors"
    return Subject(Patch.load(file), file, POLICY, QUERIES, FITTED, systems=SYSTEMS)


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["entries", "weights"])
def test_the_figures_are_those_of_evaluate_behind_the_same_messages(
    name: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    systems, page = ["--system-messages", str(folder / "systems.txt")], tmp_path / "report.html"
    assert main(command("evaluate", folder, [name], *systems)) == 0
    wanted = json.loads(capsys.readouterr().out)
    more = ["--calibration", str(folder / "fitted.txt"), "--baselines", "output"]
    assert main(report(folder, [name], page, *systems, *more)) == 0
    (found,) = json.loads(capsys.readouterr().out)["patches"]
    variants = {variant["name"]: variant["held_out"] for variant in found["variants"]}
    assert variants["patch"]["kl"] == pytest.approx(wanted["kl_patched"], rel=1e-4, abs=2e-6)
    assert variants["no prompt"]["kl"] == pytest.approx(wanted["kl_unpatched"], rel=1e-4, abs=2e-6)
    for key in ("gap_closed", "gap_closed_first", "top1_agreement", "top1_agreement_first"):
        assert variants["patch"][key] == pytest.approx(wanted[key], rel=1e-4, abs=2e-6)
    assert found["queries"] == wanted["queries"] == len(QUERIES)
    assert variants["prompt"]["kl"] == pytest.approx(0, abs=1e-6)
    # The calibration queries stand behind the other messages: the repeated fit gives the tensors of the file.
    assert found["fits"]["queries"] == len(FITTED) and found["fits"]["exact"] == (name == "weights")
    assert sorted(found["systems"]) == sorted(SYSTEMS.held_out)
    text = page.read_text()
    assert "2 different ones" in text and "\n".join(found["systems"]) in text


def test_without_the_option_entries_have_built_in_messages_and_weights_none(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """The page lists those that a measured query has: which one it has depends on its text alone."""
    codec, built_in = open_source(folder / "source").codec, load_system_messages(None).held_out
    used = {Prompting(codec, POLICY, built_in).system(query) for query in QUERIES}
    for name, systems in (("entries", used), ("weights", set())):
        assert main(report(folder, [name], tmp_path / "report.html", "--baselines", "none", "--long", "0")) == 0
        assert set(json.loads(capsys.readouterr().out)["patches"][0]["systems"]) == systems
    assert "different ones" not in (tmp_path / "report.html").read_text()


def test_a_sum_is_measured_behind_the_messages_of_each_patch(folder: Path, tmp_path: Path, capsys: Any) -> None:
    systems, page = ["--system-messages", str(folder / "systems.txt")], tmp_path / "report.html"
    short = ["--baselines", "none", "--long", "0"]
    assert main(report(folder, ["entries", "weights"], page, *systems, *short)) == 0
    found = json.loads(capsys.readouterr().out)
    assert [sorted(patch["systems"]) for patch in found["patches"]] == [sorted(SYSTEMS.held_out)] * 2
    for row, patch in zip(found["composition"], found["patches"], strict=True):
        own = next(variant["held_out"] for variant in patch["variants"] if variant["name"] == "patch")
        assert row["alone"]["gap_closed"] == pytest.approx(own["gap_closed"], rel=1e-3)


def test_a_sum_with_queries_without_system_messages_is_refused(folder: Path, tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "report.html"
    assert main(report(folder, ["entries", "weights"], page)) == 2
    error = capsys.readouterr().err
    assert "--system-messages" in error and "weights.safetensors" in error and not page.exists()


def test_messages_for_entries_in_place_of_a_system_message_are_refused(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    page = tmp_path / "report.html"
    assert main(report(folder, ["in-place"], page, "--system-messages", str(folder / "systems.txt"))) == 2
    assert "the prompt stands in place of a system message" in capsys.readouterr().err and not page.exists()


def test_the_page_does_not_replace_the_messages(folder: Path, capsys: Any) -> None:
    systems = folder / "systems.txt"
    assert main(report(folder, ["entries"], systems, "--system-messages", str(systems))) != 0
    assert systems.read_text().startswith("Be brief.")


# -- the measurements ----------------------------------------------------------------------------------------


def test_a_dialogue_has_the_system_message_of_its_opening_in_every_turn(
    source: Source, model: Any, asked: Prompting, folder: Path
) -> None:
    patch = subject(folder, "entries").patch
    found = running.measure_turns(source, model, asked, patch, QUERIES[:2], ["And then?"], 4)
    assert [turn.turn for turn in found.turns] == [1, 2, 3]
    roles, texts = zip(*found.shown["patch"], strict=True)
    assert roles == ("system", *("user", "assistant") * 3) and texts[0] == asked.system(QUERIES[0]) in SYSTEMS.held_out
    dialogues = dialogues_for(model, asked, QUERIES[:2], 4)
    base, own = TorchStudent(model), TorchStudent(model, patch)
    arms = {"none": without_prompt(base), "patch": without_prompt(own)}
    wanted = diverge(dialogues, with_prompt(base), arms)
    assert found.turns[0].forced.kl == pytest.approx(wanted["patch"].mean, rel=1e-3)
    later = [{"role": role, "content": text} for role, text in found.shown["prompt"][1:]]
    system = texts[0]
    assert asked.student(later) == source.codec.render(later, system)
    assert asked.teacher(later) == source.codec.render(later, f"{POLICY}\n\n{system}")


def test_unrelated_questions_have_system_messages(source: Source, model: Any, asked: Prompting) -> None:
    (found,) = locality.base_answers(model, asked, ["Why?"], 3)
    assert found.student_prompt == tuple(asked.student("Why?")) != tuple(source.codec.render("Why?"))
    assert found.teacher_prompt == tuple(asked.teacher("Why?"))


def test_the_length_is_checked_with_the_system_messages(
    source: Source, model: Any, asked: Prompting, folder: Path
) -> None:
    longest = max(len(asked.teacher(query)) for query in QUERIES[:4])
    fits = model.config.max_position_embeddings - longest
    check_long(Setup(source, model, None, 4, fits, ()), subject(folder, "entries"))
    with pytest.raises(RequestError, match="does not fit the context window"):
        check_long(Setup(source, model, None, 4, fits + 1, ()), subject(folder, "entries"))


def test_the_frontier_is_fitted_and_measured_behind_the_messages(
    source: Source, model: Any, asked: Prompting, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, one = Setup(source, model, None, 4, 0, (), frontier=(6,), ranks=(2,)), subject(folder, "entries")
    made: list[Patch] = []

    def kept(*arguments: Any, **more: Any) -> Patch:
        assert more["systems"] == SYSTEMS
        made.append(make_patch(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(frontier, "make_patch", kept)
    held = dialogues_for(model, asked, QUERIES, 4)
    store = RolloutStore(tmp_path / "answers.jsonl", source.digest)
    found = frontier.measure_frontier(setup, one, held, Known.of(setup, one, held), store)
    assert found.missing == [] and all(patch.before_system for patch in made if patch.prefix is not None)
    base = TorchStudent(model)
    short = Prompting(source.codec, "Rooms open at nine.", SYSTEMS.held_out)
    others = dialogues_for(model, short, QUERIES, 4)
    swapped = [type(d)(d.teacher_prompt, o.teacher_prompt, d.completion) for d, o in zip(held, others, strict=True)]
    unpatched = diverge(held, with_prompt(base), {"x": without_prompt(base)})["x"]
    wanted = measure_closeness(unpatched, diverge(swapped, with_prompt(base), {"x": without_prompt(base)})["x"])
    (point,) = (point for point in found.points if (point.series, point.label) == (SHORTER, "1 of 9 sentences"))
    assert point.held_out.kl == pytest.approx(wanted.kl, rel=1e-3)


def test_the_graph_runs_such_a_patch(
    tiny_llama: Path, tiny_llama_export: Path, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    out, page = tmp_path / "policy.safetensors", tmp_path / "report.html"
    sizes = ["--queries", str(folder / "fitted.txt"), "--holdout", "0", "--max-new-tokens", "4", "--samples", "1"]
    assert (
        main(["patch", str(tiny_llama), str(out), "--prompt", POLICY, "--prefix", "all", *behind(folder), *sizes]) == 0
    )
    capsys.readouterr()
    arguments = ["report", str(tiny_llama), str(out), "--prompt", POLICY, "--queries", str(folder / "held.txt")]
    short = ["--max-new-tokens", "4", "--long", "0", "--baselines", "none", "--json", "-o", str(page)]
    systems = ["--system-messages", str(folder / "systems.txt")]
    assert main([*arguments, *short, *systems, "--runtime", str(tiny_llama_export), "--device", "cpu"]) == 0
    variants = {v["name"]: v for v in json.loads(capsys.readouterr().out)["patches"][0]["variants"]}
    assert variants["patch"]["held_out"]["gap_closed"] > 0.9 and variants["patch"]["first_token_ms"] > 0
    assert variants["prompt, cached prefix"]["held_out"]["gap_closed"] > 0.999
