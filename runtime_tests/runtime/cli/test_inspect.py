"""`tp-runtime inspect`: what it shows of patches and model folders."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.cli import Cli
from runtime_tests.folders import alter, fill
from runtime_tests.patches import random_config, random_patch
from tp_runtime.patch import Patch
from tp_runtime.session import ModelFolder


def save(tmp_path: Path, patch: Patch) -> Path:
    file = tmp_path / "patch.safetensors"
    patch.save(file)
    return file


def test_a_patch_is_shown_as_a_table(cli: Cli, tmp_path: Path) -> None:
    file = save(tmp_path, random_patch(layers=3, ranks=[2, 4, 0]))
    result = cli("inspect", file)
    rows = dict(line.split("  ", 1) for line in result.out.splitlines())
    shown = {name: value.strip() for name, value in rows.items()}
    assert result.code == 0
    assert shown == {
        "patch": "pirate",
        "method": "output",
        "base model": "tests/tiny-llama",
        "base digest": "0123456789abcdef" * 4,
        "architecture": "LlamaForCausalLM",
        "fitted on": "fp32",
        "rank": "0, 2, 4",
        "sites": "mlp_out",
        "layers": "0-2 (3 slots)",
        "KV prefix": "none",
        "file": shown["file"],
        "memory": shown["memory"],
        "identity": Patch.load(file).identity,
        "form": "weights",
        "strength": "any",
        "sums": "with anything",
        "system": "allowed",
        "exports": "LoRA, control vector, ONNX adapter, merge",
        "precisions": "any",
        "stop": "none: only requests name stop strings",
        "ridge": "1",
        "calibration": "queries 44, rows 1200, max_new_tokens 40, holdout 16",
        "held out": "kl_unpatched 0.657, kl 0.03, top1 0.9",
        "report": "none: tp-export report --store makes one",
        "context": "the text is not in the file; SHA-256 " + "ab" * 32,
        "probe": "2 positions",
        "licence": "Apache-2.0",
        "created": "2025-01-31T12:00:00+00:00",
    }
    assert str(file.stat().st_size) in shown["file"] and shown["file"].endswith(", f16")
    assert shown["memory"] == f"{Patch.load(file).memory_bytes} bytes while it is loaded"


def test_a_patch_is_shown_as_json(cli: Cli, tmp_path: Path) -> None:
    file = save(tmp_path, random_patch(config=random_config(context="Talk like a pirate.")))
    report = cli("inspect", file, "--json").json
    config = random_config()
    assert report["kind"] == "patch"
    assert (report["ranks"], report["layers"], report["sites"]) == ([4], [0, 1], ["mlp_out"])
    assert (report["holds_context"], report["probe_positions"]) == (True, 2)
    assert (report["fidelity"], report["calibration"]) == (config.fidelity, config.calibration)


def test_missing_facts_of_a_patch_are_shown_as_unknown(cli: Cli, tmp_path: Path) -> None:
    nothing: dict[str, Any] = dict.fromkeys(("ridge", "calibration", "fidelity", "licence", "created", "probe"))
    result = cli("inspect", save(tmp_path, random_patch(config=random_config(context_digest="", **nothing))))
    for name in ("ridge", "calibration", "held out", "licence", "created"):
        assert any(line.startswith(name) and line.endswith("unknown") for line in result.out.splitlines())
    assert "probe         none" in result.out


def test_a_patch_cannot_steer_the_terminal_or_add_rows(cli: Cli, tmp_path: Path) -> None:
    config = random_config(licence="MIT\x1b[2J\nidentity  0000", fidelity={"kl\nidentity  0000": 1.0})
    lines = cli("inspect", save(tmp_path, random_patch(config=config))).out.splitlines()
    assert sum(line.startswith("identity") for line in lines) == 1
    assert not any("\x1b" in line for line in lines)


def test_a_model_is_shown_as_a_table(cli: Cli, tiny_llama_export: Path) -> None:
    folder = ModelFolder.open(tiny_llama_export)
    slot = folder.slots[0, "mlp_out"]
    result = cli("inspect", tiny_llama_export)
    assert result.code == 0
    for text in (
        folder.base_model,
        folder.base_digest,
        "llama",
        "fp32",
        "chat",
        f"{folder.context_window} tokens",
        f"mlp_out [{slot.inputs} -> {slot.outputs}] in layers 0-{folder.layers - 1}\n",
        "none",
        "sizes match",
        *folder.files,
        *(str(record.bytes) for record in folder.files.values()),
    ):
        assert text in result.out
    assert "unlisted" not in result.out


def test_a_model_is_shown_as_json(cli: Cli, tiny_gemma_export: Path) -> None:
    report = cli("inspect", tiny_gemma_export, "--json", "--verify").json
    folder = ModelFolder.open(tiny_gemma_export)
    assert report["kind"] == "model"
    assert report["verified"] is True
    assert report["slots"] == len(folder.slots)
    assert report["style"] == "completion"
    assert set(report["sites"]) == {site for _, site in folder.slots}
    slot = folder.slots[0, "mlp_out"]
    layers = list(range(folder.layers))
    assert report["sites"]["mlp_out"] == [{"in": slot.inputs, "out": slot.outputs, "layers": layers}]
    assert report["graph_digest"] == folder.graph_digest


def test_a_default_patch_and_unlisted_files_are_shown(cli: Cli, tmp_path: Path) -> None:
    path = fill(tmp_path / "model")
    terms = [["a" * 64, 0.5], ["b" * 64, -1]]
    default = {"name": "p+q", "identity": "c" * 64, "terms": terms, "repair": False}
    alter(path, lambda data: data.update(default_patch=default))
    (path / "notes\x1b.txt").write_text("")
    out = cli("inspect", path).out
    assert "default patch   p+q\n" in out
    assert "0.5 * " + "a" * 64 in out
    assert "-1 * " + "b" * 64 in out
    assert r"'notes\x1b.txt': nothing reads them" in out


def test_verify_finds_a_change_that_keeps_the_size(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fill(tmp_path / "model")
    monkeypatch.setattr("tp_runtime.session.model_folder.ALWAYS_HASHED", 10)
    data = path / "model.onnx_data"
    data.write_bytes(data.read_bytes()[::-1])
    assert cli("inspect", path).code == 0
    result = cli("inspect", path, "--verify")
    assert result.code == 2
    assert "model.onnx_data" in result.err


def test_inspect_opens_no_session(cli: Cli, tiny_llama_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert cli("inspect", tiny_llama_export).code == 0


def test_slots_of_several_shapes_are_listed_separately(cli: Cli, tmp_path: Path) -> None:
    path = fill(tmp_path / "model")
    alter(path, lambda data: data["slots"][1].update(out=6))
    out = cli("inspect", path).out
    assert "mlp_out [8 -> 4] in layers 0\n" in out
    assert "mlp_out [8 -> 6] in layers 1\n" in out


@pytest.mark.parametrize("name", ["junk.safetensors", "weights.pt", "nothing.safetensors", "folder"])
def test_a_path_that_is_neither_a_patch_nor_a_model_is_refused(cli: Cli, tmp_path: Path, name: str) -> None:
    (tmp_path / "junk.safetensors").write_bytes(b"not a patch at all")
    (tmp_path / "weights.pt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    result = cli("inspect", tmp_path / name)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")


def test_several_ranks_and_gaps_between_layers_are_shown_as_ranges(cli: Cli, tmp_path: Path) -> None:
    patch = random_patch(layers=5, ranks=[1, 2, 3, 3, 7])
    some = {slot: delta for slot, delta in patch.deltas.items() if slot[0] != 3}
    out = cli("inspect", save(tmp_path, replace(patch, deltas=some))).out
    assert "rank          1-3, 7\n" in out
    assert "layers        0-2, 4 (4 slots)\n" in out
