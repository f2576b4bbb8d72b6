"""`tp-runtime bench`: it measures what it reports. These tests do not judge how fast anything is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime_tests.cli import Cli
from runtime_tests.patches import patch_for, random_config, random_patch
from tp_runtime import bench
from tp_runtime.bench import steps
from tp_runtime.generation import Sampler
from tp_runtime.session import Graph, ModelFolder

QUICK = ("--tokens", "3", "--prompt-tokens", "5", "--rounds", "2", "--device", "cpu")


def test_a_random_patch_is_measured_by_default(cli: Cli, tiny_llama_export: Path) -> None:
    result = cli("bench", tiny_llama_export, *QUICK, "--json")
    report = result.json
    assert result.code == 0
    assert (report["patch"], report["patch_file"], report["patch_rank"]) == ("random", None, 16)
    assert report["patch_inputs"] == 3 * report["patch_slots"]
    for name in ("model_load_s", "patch_load_ms", "switch_ms", "switch_first_step_ms", "patch_bytes", "python_ms"):
        assert report[name] > 0
    for name in ("first_token", "token"):
        times = report[f"{name}_ms"]
        assert min(times.values()) > 0
        assert report[f"{name}_ratio"] == pytest.approx(times["patched"] / times["unpatched"])
        assert math.isfinite(report[f"{name}_ratio_per_round"])
    assert (report["rounds"], report["tokens"], report["prompt_tokens"]) == (2, 3, 5)
    assert set(report["versions"]) == {"tp-runtime", "numpy", "onnxruntime", "python"}


def test_the_default_output_is_a_table(cli: Cli, tiny_llama_export: Path, tmp_path: Path) -> None:
    file = tmp_path / "patch.safetensors"
    folder = ModelFolder.open(tiny_llama_export)
    patch_for(folder, rank=5).save(file)
    result = cli("bench", tiny_llama_export, *QUICK, "--patch", file)
    assert f"random-0, rank 5 in {len(folder.slots)} slots" in result.out
    assert "made for this run" not in result.out
    for label in ("first token", "each further token", "load a patch", "switch", "python", "medians of 2 rounds"):
        assert label in result.out


def test_time_inside_a_session_run_does_not_count_as_python_time(
    tiny_llama_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = Graph(ModelFolder.open(tiny_llama_export), "cpu", threads=1)
    session = graph.session
    now = [0.0]
    monkeypatch.setattr(steps.time, "perf_counter", lambda: now[0])

    class Slow:
        """A session whose runs take one second each; `pick` takes a quarter of a second."""

        def run_with_iobinding(self, binding: object) -> None:
            now[0] += 1
            session.run_with_iobinding(binding)

    def pick(_sampler: object, _logits: object, _history: object, _draw: int) -> int:
        now[0] += 0.25
        return 1

    monkeypatch.setattr(Sampler, "pick", pick)
    graph.session = slow = Slow()  # type: ignore[assignment]
    assert bench.python_seconds(bench.base_arm("base", graph, 4), 3) == [0.25, 0.25, 0.25]
    assert graph.session is slow and now[0] == 4 + 4 * 0.25  # the prompt and three tokens


def test_the_arms_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def answer(_graph: object, _prompt: object, bound: str, **_: object) -> object:
        for _ in range(4):
            order.append(bound)
            yield 0

    monkeypatch.setattr(steps, "generate", answer)
    graph = SimpleNamespace(captured=None)
    two = [bench.Arm(name, graph, name, [1]) for name in ("base", "patch")]  # type: ignore[arg-type]
    measured = bench.one_round(two, 3, first=1)
    assert order == ["patch", "base", "base", "patch"] * 2
    assert [len(steps) for steps in measured] == [4, 4]
    assert min(map(min, measured)) > 0
    order.clear()
    three = [bench.Arm(name, graph, name, [1]) for name in "abc"]  # type: ignore[arg-type]
    bench.one_round(three, 2, first=0)
    assert "".join(order) == "abcbcacab"
    order.clear()
    graph.captured = object()  # its buffers hold one sequence, which decodes to its end
    measured = bench.one_round(three, 2, first=1)
    assert "".join(order) == "bbbcccaaa" and [len(steps) for steps in measured] == [3, 3, 3]


def test_ratios_are_relative_to_the_first_arm(tiny_llama_export: Path) -> None:
    graph = Graph(ModelFolder.open(tiny_llama_export), "cpu")
    arms = [bench.base_arm(name, graph, 3) for name in "ab"]
    times = [bench.Times([1.0, 2.0, 4.0], [1.0, 1.0, 2.0]), bench.Times([2.0, 2.0, 2.0], [3.0, 2.0, 2.0])]
    base, other = bench.compare(arms, times)
    assert (base["first_ratio"], base["token_ratio_per_round"]) == (1.0, 1.0)
    assert (other["first_ms"], other["first_ratio"], other["first_ratio_per_round"]) == (2000.0, 1.0, 1.0)
    assert (other["token_ratio"], other["token_ratio_per_round"]) == (2.0, 2.0)


def test_several_patches_and_ranks_can_be_measured(cli: Cli, tiny_llama_export: Path, tmp_path: Path) -> None:
    folder = ModelFolder.open(tiny_llama_export)
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for number, file in enumerate(files):
        patch_for(folder, rank=2 + number).save(file)
    options = [word for file in files for word in ("--patch", file)]
    result = cli("bench", tiny_llama_export, *QUICK, *options, "--ranks", "0,1,3", "--json")
    arms = result.json["arms"]
    assert [arm["patch_rank"] for arm in arms] == [None, 2, 3, None, 1, 3]
    assert [arm["label"] for arm in arms][3:] == ["base again", "random, rank 1", "random, rank 3"]
    assert [("patch_load_ms" in arm) for arm in arms] == [False, True, True, False, False, False]
    assert result.json["token_ratio"] == arms[1]["token_ratio"]
    assert result.json["patch_rank"] == 2


def test_other_folders_can_be_measured_for_comparison(cli: Cli, tiny_llama_export: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_export, other)
    result = cli("bench", tiny_llama_export, *QUICK, "--against", other, "--against", tiny_llama_export, "--json")
    labels = [arm["label"] for arm in result.json["arms"]]
    name = tiny_llama_export.name
    assert labels == ["base", "random", "other: base", "other: random", f"{name}: base", f"{name}: random"]
    assert result.json["against"] == [str(other), str(tiny_llama_export)]


def test_a_folder_that_does_not_exist_is_refused(cli: Cli, tiny_llama_export: Path, tmp_path: Path) -> None:
    result = cli("bench", tiny_llama_export, *QUICK, "--against", tmp_path / "nothing")
    assert (result.code, result.out) == (2, "")
    assert "no such model folder" in result.err


def test_the_cost_of_many_loaded_patches_is_reported(cli: Cli, tiny_llama_export: Path) -> None:
    result = cli("bench", tiny_llama_export, *QUICK, "--resident", "5,1", "--json")
    rows = result.json["resident"]
    assert [row["patches"] for row in rows] == [1, 5]
    assert min(row[key] for row in rows for key in ("switch_ms", "convert_ms", "files_bytes", "converted_bytes")) > 0
    assert all(row["anonymous_bytes"] is None or isinstance(row["anonymous_bytes"], int) for row in rows)
    assert "5 loaded" in cli("bench", tiny_llama_export, *QUICK, "--resident", "5").out


def test_the_output_file_contains_what_json_prints(cli: Cli, tiny_llama_export: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    for _ in range(2):  # the second run replaces the file of the first one
        result = cli("bench", tiny_llama_export, *QUICK, "--json", "-o", file)
    assert json.loads(file.read_text(encoding="utf-8")) == result.json
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_an_output_file_that_bench_did_not_write_is_kept_and_found_before_the_work(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tiny_llama_export: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("tp_runtime.cli.bench.open_model", lambda _args: pytest.fail("the output is checked first"))
    for text in ('{"version": 1}', "notes", '[{"arms": 1}]'):
        (tmp_path / "notes.json").write_text(text)
        result = cli("bench", tiny_llama_export, *QUICK, "-o", tmp_path / "notes.json")
        assert result.code == 2 and "is not replaced" in result.err
        assert (tmp_path / "notes.json").read_text() == text


def test_an_output_file_that_cannot_be_written_is_an_error(cli: Cli, tiny_llama_export: Path, tmp_path: Path) -> None:
    assert cli("bench", tiny_llama_export, *QUICK, "-o", tmp_path / "no" / "bench.json").code == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tokens", "1"], "tokens"),
        (["--rounds", "0"], "rounds"),
        (["--prompt-tokens", "0"], "prompt_tokens"),
        (["--prompt-tokens", "1000000"], "context window"),
        (["--patch", "nothing"], "no such file"),
        (["--ranks", "1,x"], "ranks"),
        (["--ranks", "-1"], "ranks"),
        (["--resident", "0"], "resident"),
    ],
)
def test_bad_options_are_refused(cli: Cli, tiny_llama_export: Path, args: list[str], message: str) -> None:
    result = cli("bench", tiny_llama_export, "--device", "cpu", *args)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_a_patch_that_does_not_fit_is_refused(cli: Cli, tiny_llama_export: Path, tmp_path: Path) -> None:
    file = tmp_path / "patch.safetensors"
    digest = ModelFolder.open(tiny_llama_export).base_digest
    random_patch(config=random_config(base_digest=digest)).save(file)
    result = cli("bench", tiny_llama_export, *QUICK, "--patch", file)
    assert result.code == 2
    assert "does not fit" in result.err


def test_a_patch_without_effect_is_not_measured(cli: Cli, tiny_llama_export: Path, tmp_path: Path) -> None:
    file = tmp_path / "patch.safetensors"
    patch_for(ModelFolder.open(tiny_llama_export), scale=0.0).save(file)
    result = cli("bench", tiny_llama_export, *QUICK, "--patch", file)
    assert result.code == 2
    assert "changes nothing" in result.err


def test_arms_of_different_sessions_are_separated_by_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(steps, "_settle", lambda: waits.append(1))
    monkeypatch.setattr(steps, "generate", lambda *_, **__: iter(range(3)))
    one, other = SimpleNamespace(captured=None), SimpleNamespace(captured=None)
    one_session = [bench.Arm(name, one, name, [1]) for name in "ab"]  # type: ignore[arg-type]
    bench.one_round(one_session, 2, first=0)
    assert not waits
    two_sessions = [*one_session, bench.Arm("c", other, "c", [1])]  # type: ignore[arg-type]
    bench.one_round(two_sessions, 2, first=0)
    assert len(waits) == 3 * len(two_sessions)
