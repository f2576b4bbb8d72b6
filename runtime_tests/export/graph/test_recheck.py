"""`tp-export check --tokens` and `--source`: they find the folders that an earlier version exported wrongly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.export.tiny import tiny_model
from runtime_tests.folders import alter, without_tables
from tp_export import cli
from tp_export.source import open_source
from tp_runtime.session import describe_files
from tp_runtime.text import TABLES


def rewritten(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit a JSON file of an exported folder as if it had been exported so: its new digest is listed."""
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    record = describe_files(folder, [name])[name]
    alter(folder, lambda listed: listed["files"].update({name: {"sha256": record.sha256, "bytes": record.bytes}}))


def check(*arguments: object) -> int:
    return cli.main(["check", *map(str, arguments)])


@pytest.fixture
def folder(tiny_llama_export: Path, tmp_path: Path) -> Path:
    """An export of `tiny_llama` that a test may alter."""
    return Path(shutil.copytree(tiny_llama_export, tmp_path / "export"))


def test_a_healthy_folder_passes_all_checks(folder: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(folder, "--tokens") == 0
    assert "OK token ids: those of transformers on the sample texts" in capsys.readouterr().out
    assert check(folder, "--source", tiny_llama) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "OK base: the source has the folder's base digest, and all of its weights" in lines
    assert any(line.startswith("OK predictions: fp32 on 64 tokens") for line in lines)


def test_a_folder_with_other_token_ids_than_transformers_is_found(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions copied tokenizer_config.json, which transformers reads, and followed tokenizer.json alone."""
    rewritten(folder, "tokenizer_config.json", lambda data: data.update(additional_special_tokens=["tok", "ll"]))
    assert check(folder, "--tokens") == 2
    assert "the folder's token ids are not those of transformers" in capsys.readouterr().err


def test_a_folder_that_follows_another_tokenizer_than_its_source_is_found(
    folder: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewritten(without_tables(folder), "tokenizer.json", lambda data: data.update(added_tokens=data["added_tokens"][:2]))
    assert check(folder, "--source", tiny_llama) == 2
    assert "the folder's token ids are not those of transformers" in capsys.readouterr().err


def test_tables_of_another_tokenizer_are_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They state the digest of tokenizer.json, and hold other merges."""
    content = bytearray((folder / TABLES).read_bytes())
    content[-1] ^= 1  # a place in the order of merges
    (folder / TABLES).write_bytes(content)
    record = describe_files(folder, [TABLES])[TABLES]
    alter(folder, lambda data: data["files"].update({TABLES: {"sha256": record.sha256, "bytes": record.bytes}}))
    assert check(folder) == 2
    assert "the tables of the tokenizer are not those of tokenizer.json" in capsys.readouterr().err


def test_a_folder_of_another_base_is_found(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny_model(tmp_path / "other", "llama", seed=1)
    assert check(folder, "--source", other) == 2
    assert "the folder is not an export of this source" in capsys.readouterr().err


def test_a_folder_whose_base_digest_has_changed_since_is_found(
    folder: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    shutil.copy(source / "model.safetensors", source / "consolidated.safetensors")
    change = open_source(source).digest_change
    assert change is not None
    alter(folder, lambda data: data.update(base_digest=change.before))
    assert check(folder, "--source", source) == 2
    error = capsys.readouterr().err
    assert "an earlier version read the source in another way: it covered files that are not loaded" in error


def test_a_folder_that_computes_something_else_than_its_source_is_found(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions drew missing weights at random, so a folder can have its source's digest and other weights."""
    other = tiny_model(tmp_path / "other", "llama", seed=1)
    alter(folder, lambda data: data.update(base_digest=open_source(other).digest))
    assert check(folder, "--source", other) == 2
    assert "the exported graph does not compute what the model computes" in capsys.readouterr().err


def test_a_window_that_the_graph_does_not_have_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewritten(folder, "genai_config.json", lambda data: data["model"].update(context_length=100_000))
    assert check(folder) == 2
    assert "onnxruntime-genai would use another context window than the graph has" in capsys.readouterr().err


def test_the_results_are_also_printed_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(folder, "--tokens", "--json") == 0
    assert "token ids: those of transformers on the sample texts" in json.loads(capsys.readouterr().out)["checks"]
