"""The base digest: which changes of a model's folder change it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tp_export.source import open_source
from tp_runtime.errors import ModelFormatError


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "another-name"))


def test_a_copy_has_the_same_digest(copy: Path, tiny_llama: Path) -> None:
    assert open_source(copy).digest == open_source(tiny_llama).digest


def test_tool_versions_and_file_layout_do_not_change_the_digest(copy: Path, tiny_llama: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {"transformers_version": "9.9", "_name_or_path": "elsewhere", "use_cache": False}
    (copy / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    half = len(tensors) // 2
    weight_map = {}
    for number, part in enumerate((list(tensors.items())[half:], list(tensors.items())[:half])):
        save_file(dict(part), copy / f"model-{number}.safetensors")
        weight_map |= {name: f"model-{number}.safetensors" for name, _ in part}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert open_source(copy).digest == open_source(tiny_llama).digest


@pytest.mark.parametrize("what", ["weight", "config", "tokenizer", "template"])
def test_a_change_of_the_model_changes_the_digest(what: str, copy: Path, tiny_llama: Path) -> None:
    if what == "weight":
        tensors = load_file(copy / "model.safetensors")
        name = next(iter(tensors))
        tensors[name].view(-1)[0] += 1e-3
        save_file(tensors, copy / "model.safetensors")
    elif what == "config":
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    elif what == "tokenizer":
        text = (copy / "tokenizer.json").read_text()
        (copy / "tokenizer.json").write_text(
            text.replace('"add_prefix_space":false', '"add_prefix_space":true', 1).replace(
                '"add_prefix_space": false', '"add_prefix_space": true', 1
            )
        )
    else:
        config = json.loads((copy / "tokenizer_config.json").read_text())
        template = config["chat_template"].replace("Be kind.", "Be rude.")
        (copy / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    assert open_source(copy).digest != open_source(tiny_llama).digest


def test_pickled_weights_are_not_read(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelFormatError, match="the folder has no safetensors weights"):
        _ = open_source(copy).digest


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_refused() -> None:
    with pytest.raises(ModelFormatError, match="there is no such folder"):
        open_source("nobody/nothing-of-this-name")
