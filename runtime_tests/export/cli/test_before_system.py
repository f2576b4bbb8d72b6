"""`--before-system`: a patch that stands in front of each request's own system message, from the fit to the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.export.tiny import tiny_model
from tp_export import cli
from tp_export.rollout import Prompting, dialogues_for
from tp_runtime.patch import Patch

POLICY = "Rooms open at nine. Nobody smokes. Keys are at the desk. " * 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("source") / "tiny", "llama")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str | None]]:
    """The system messages of the queries of each call of `dialogues_for`: those fitted, then those held out."""
    found: list[list[str | None]] = []

    def recording(model: Any, prompting: Prompting, queries: list[str], *arguments: Any, **options: Any) -> Any:
        found.append([prompting.system(query) for query in queries])
        return dialogues_for(model, prompting, queries, *arguments, **options)

    monkeypatch.setattr("tp_export.fit.make.dialogues_for", recording)
    return found


def fit(source: Path, out: Path, *more: str) -> int:
    queries = out.parent / "queries.txt"
    queries.write_text("".join(f"Who is number {number}?\n" for number in range(6)))
    sizes = ["--queries", str(queries), "--holdout", "2", "--max-new-tokens", "4", "--samples", "1"]
    return cli.main(["patch", str(source), str(out), "--prompt", POLICY, *sizes, *more])


def test_the_fit_asks_behind_system_messages_and_the_figures_are_of_held_out_ones(
    source: Path, tmp_path: Path, asked: list[list[str | None]], capsys: Any
) -> None:
    out, systems = tmp_path / "policy.safetensors", tmp_path / "systems.txt"
    systems.write_text("Be brief.\nBe kind.\nBe exact.\nYou answer by telephone.\n")
    assert fit(source, out, "--prefix", "6", "--before-system", "--system-messages", str(systems)) == 0
    fitted, held_out = asked
    assert fitted and set(fitted) <= {"Be brief.", "Be kind.", "Be exact."}
    assert set(held_out) == {"You answer by telephone."}
    patch = Patch.load(out)
    assert patch.prefix is not None and patch.prefix.before_system and patch.prefix.longest < patch.prefix.position
    assert patch.config.fidelity is not None
    held = tmp_path / "held.txt"
    held.write_text("Where is the key?\nWho smokes?\n")
    capsys.readouterr()
    arguments = ["evaluate", str(source), str(out), "--prompt", POLICY, "--queries", str(held), "--json"]
    assert cli.main([*arguments, "--system-messages", str(systems), "--max-new-tokens", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["queries"] == 2
    assert cli.main([*arguments, "--max-new-tokens", "4"]) == 0  # behind built-in messages


def test_weights_are_fitted_behind_system_messages_too(
    source: Path, tmp_path: Path, asked: list[list[str | None]]
) -> None:
    out = tmp_path / "weights.safetensors"
    assert fit(source, out, "--rank", "2", "--before-system") == 0
    fitted, held_out = asked
    assert all([*fitted, *held_out]) and not set(fitted) & set(held_out)
    patch = Patch.load(out)
    assert patch.capabilities.form == "weights" and patch.capabilities.system == "allowed"
    systems, held = tmp_path / "systems.txt", tmp_path / "held.txt"
    systems.write_text("Be brief.\n")
    held.write_text("Where is the key?\n")
    arguments = ["evaluate", str(source), str(out), "--prompt", POLICY, "--queries", str(held), "--max-new-tokens", "4"]
    assert cli.main([*arguments, "--system-messages", str(systems)]) == 0


def test_system_messages_without_the_option_are_refused(source: Path, tmp_path: Path, capsys: Any) -> None:
    out, systems = tmp_path / "policy.safetensors", tmp_path / "systems.txt"
    systems.write_text("Be brief.\n")
    assert fit(source, out, "--system-messages", str(systems)) == 2
    assert "--system-messages" in (error := capsys.readouterr().err) and "--before-system" in error
    assert not out.exists()
