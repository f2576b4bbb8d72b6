"""This module writes tiny model folders for tests; they are valid and have the exporter's layout."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tp_runtime.session import KV, ModelFolder, Slot, describe_files, write_slots_file
from tp_runtime.session.description import SLOTS_FILE
from tp_runtime.text import TABLES

BASE_DIGEST = "0123456789abcdef" * 4


def describe(path: Path, **changes: Any) -> ModelFolder:
    """Return a description of the files in a folder; keyword arguments replace its values."""
    folder = ModelFolder(
        path=path,
        architecture="llama",
        base_model="tests/tiny-llama",
        base_digest=BASE_DIGEST,
        precision="fp32",
        style="chat",
        route="fused",
        layers=2,
        vocab_size=64,
        context_window=128,
        kv=KV(heads=1, head_dim=4, dtype="f32"),
        slots={(layer, "mlp_out"): Slot(layer, "mlp_out", 8, 4) for layer in range(2)},
        default_patch=None,
        files=describe_files(path, sorted(entry.name for entry in path.iterdir() if entry.name != SLOTS_FILE)),
    )
    return dataclasses.replace(folder, **changes)


def fill(path: Path) -> Path:
    """Write a model folder whose graph is not an ONNX graph, for tests that do not open the graph."""
    path.mkdir(parents=True)
    (path / "model.onnx").write_bytes(b"graph")
    (path / "model.onnx_data").write_bytes(b"weights" * 100)
    (path / "config.json").write_text("{}")
    write_slots_file(describe(path))
    return path


def alter(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a folder's description after `change` has edited its parsed JSON in place."""
    file = path / SLOTS_FILE
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def without_tables(path: Path) -> Path:
    """Make a folder one of an earlier version, which has no tables of its tokenizer; return it."""
    (path / TABLES).unlink()
    alter(path, lambda data: data["files"].pop(TABLES))
    return path
