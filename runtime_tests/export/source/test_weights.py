"""Which files of a folder are the base's weights, and what the base digest makes of the others.

The digests here were computed by the version before this module, so they show that healthy bases keep theirs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from runtime_tests.patches import random_config, random_patch
from tp_export.cli import main
from tp_export.graph import export_model
from tp_export.source import load_model, open_source
from tp_runtime.cli import main as edge_main
from tp_runtime.errors import ModelFormatError, TPError, UnsafePathError
from tp_runtime.session import DigestChange, ModelFolder

FROZEN = "9b544bbf8bbd73c8cfe55e71873b0882313d3113311e4a0463e633b1208b9562"
WITH_CONSOLIDATED = "4f19470e9e069261f8f48bbbe33db077404d33dd97e7a26be41bbe4abf33bfd7"
INDEX = "model.safetensors.index.json"

Weights = dict[str, NDArray]


def weights() -> Weights:
    """Return tensors of three dtypes that depend on no library's random numbers; their order is not that of names."""
    numbers = np.arange(640, dtype=np.float32)
    return {
        "model.norm.weight": np.sin(numbers[:64]),
        "model.embed_tokens.weight": np.cos(numbers).reshape(40, 16).astype(np.float16),
        "lm_head.weight": (numbers / 7).reshape(40, 16),
        "count": np.array(3, np.int64),
    }


def write(folder: Path, shards: int = 1) -> Path:
    """Write a base with the tensors of `weights`, in one file or in shards with an index."""
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 16, "rms_norm_eps": 1e-05, "transformers_version": "4.0"}
    (folder / "config.json").write_text(json.dumps(config))
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "<s>": 2}, "merges": []}
    added = {"id": 2, "content": "<s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [{**added, "normalized": False}], "model": model})
    )
    # Without this class, transformers takes the one of Llama, which puts a BOS in front of every text.
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<s>", "chat_template": "{{ 'ü' }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    if shards == 1:
        save_file(weights(), folder / "model.safetensors")
    else:
        weight_map = {}
        for number in range(shards):
            name = f"model-{number}.safetensors"
            part = dict(list(weights().items())[number::shards])
            save_file(part, folder / name)
            weight_map |= dict.fromkeys(part, name)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def point(folder: Path, tensor: str, file: str | None) -> None:
    """Make the index place `tensor` in `file`, or leave it out."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][tensor] = file
    if file is None:
        del index["weight_map"][tensor]
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_healthy_bases_keep_their_digests(shards: int, tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "base", shards))
    assert source.digest == FROZEN and source.digest_change is None


def test_links_to_the_files_change_nothing(tmp_path: Path) -> None:
    """The hub's cache holds links to its blobs, and so may a folder of the user's own."""
    blobs = write(tmp_path / "blobs", 2)
    (tmp_path / "base").mkdir()
    for file in blobs.iterdir():
        (tmp_path / "base" / file.name).symlink_to(f"../blobs/{file.name}")
    assert open_source(tmp_path / "base").digest == FROZEN


def test_a_file_that_is_not_loaded_leaves_the_digest_and_the_earlier_digest_is_known(tmp_path: Path) -> None:
    folder = write(tmp_path / "base")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    source = open_source(folder)
    assert source.digest == FROZEN
    assert source.digest_change == DigestChange(
        WITH_CONSOLIDATED, "it covered files that are not loaded: consolidated.safetensors"
    )


def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    folder = write(tmp_path / "base", 2)
    save_file(weights(), folder / "model.safetensors")
    source = open_source(folder)
    assert {tensor.file.name for tensor in source.tensors} == {"model.safetensors"} and source.digest == FROZEN
    change = source.digest_change
    assert change is not None and change.reason.endswith("model-0.safetensors, model-1.safetensors")


def test_the_file_that_the_config_names_is_the_one_that_counts(tmp_path: Path) -> None:
    folder = write(tmp_path / "base")
    save_file({"other": np.zeros(3)}, folder / "own.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "own.safetensors"}))
    assert [tensor.name for tensor in open_source(folder).tensors] == ["other"]


def test_a_config_that_names_a_weights_file_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "../own.safetensors"}))
    with pytest.raises(UnsafePathError, match="transformers_weights"):
        _ = open_source(folder).digest


def test_a_damaged_file_that_is_not_loaded_changes_nothing(tmp_path: Path) -> None:
    """Earlier versions refused such a folder, so there is no earlier digest."""
    folder = write(tmp_path / "base")
    (folder / "._model.safetensors").write_bytes(b"\0\5\26\7")
    source = open_source(folder)
    assert source.digest == FROZEN and source.digest_change is None


def test_the_exported_folder_and_inspect_say_the_earlier_digest(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = Path(shutil.copytree(tiny_llama, tmp_path / "src"))
    healthy = open_source(src).digest
    save_file({"x": np.ones(4, np.float32)}, src / "stray.safetensors")
    source = open_source(src)
    out = export_model(source, tmp_path / "out")
    folder = ModelFolder.open(out)
    assert folder.base_digest == healthy and folder.digest_change == source.digest_change is not None
    assert edge_main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert healthy in shown and f"before this version: {source.digest_change.before}, because it covered" in shown


def test_weights_under_a_name_that_transformers_does_not_load_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(ModelFormatError, match=r"under the names that transformers loads; got weights\.safetensors"):
        _ = open_source(folder).digest


INDEX_FAULTS: dict[str, tuple[type[TPError], str, Callable[[Path], object]]] = {
    "a shard is missing": (ModelFormatError, "are missing", lambda f: (f / "model-1.safetensors").unlink()),
    "a tensor is not in its shard": (ModelFormatError, "no ghost", lambda f: point(f, "ghost", "model-0.safetensors")),
    "a path leads out": (UnsafePathError, "not in the model's", lambda f: point(f, "x", "../other/m.safetensors")),
    "an absolute path": (UnsafePathError, "not in the model's", lambda f: point(f, "x", "/etc/hostname")),
    "a folder": (UnsafePathError, "not in the model's", lambda f: point(f, "x", ".")),
    "no map": (ModelFormatError, "does not list the files", lambda f: (f / INDEX).write_text('{"weight_map": []}')),
    "an empty map": (ModelFormatError, "does not list", lambda f: (f / INDEX).write_text('{"weight_map": {}}')),
    "no JSON": (ModelFormatError, "not valid JSON", lambda f: (f / INDEX).write_text("{")),
    "a tensor in two shards": (
        ModelFormatError,
        "two files hold a tensor of the same name",
        lambda f: save_file(weights(), f / "model-1.safetensors"),
    ),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_an_index_that_does_not_fit_its_files_is_refused(fault: str, tmp_path: Path) -> None:
    kind, text, damage = INDEX_FAULTS[fault]
    folder = write(tmp_path / "base", 2)
    damage(folder)
    with pytest.raises(kind, match=text):
        _ = open_source(folder).digest


def test_a_tensor_that_the_index_forgets_counts_as_loaded(tmp_path: Path) -> None:
    folder = write(tmp_path / "base", 2)
    point(folder, "count", None)
    assert open_source(folder).digest == FROZEN


@pytest.mark.parametrize("content", [b"", b"\0", b"\xff" * 9, b"\2\0\0\0\0\0\0\0{}", bytes(200)])
def test_a_file_that_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = write(tmp_path / "base")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelFormatError, match="safetensors"):
        load_model(open_source(folder))


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "source.json", "config.json"])
def test_a_fifo_among_the_files_does_not_hang(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "base", 2 if name == INDEX else 1)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if name == "source.json":  # only fetch writes this file, and a folder without it is whole
        assert open_source(folder).digest == FROZEN
        return
    with pytest.raises(ModelFormatError, match=r"not a regular file|no config\.json"):
        _ = open_source(folder).digest


def test_a_huge_config_is_refused_without_reading_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "base")
    with (folder / "config.json").open("r+b") as handle:
        handle.truncate(1 << 40)  # a file with a hole, which takes no space
    with pytest.raises(ModelFormatError, match="the file is too large"):
        open_source(folder)


def test_the_command_line_refuses_a_patch_of_the_earlier_digest_and_says_why(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = Path(shutil.copytree(tiny_llama, tmp_path / "src"))
    shutil.copy(src / "model.safetensors", src / "consolidated.safetensors")
    change = open_source(src).digest_change
    assert change is not None
    random_patch(config=random_config(base_digest=change.before)).save(tmp_path / "p.safetensors")
    assert main(["lora", str(tmp_path / "p.safetensors"), str(tmp_path / "o"), "--base", str(src)]) == 2
    error = capsys.readouterr().err
    assert "it covered files that are not loaded" in error and "fit the patch again" in error
