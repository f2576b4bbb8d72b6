"""The checks and corrections of a tokenizer, on one with 258 tokens. The session fixtures cover real weights."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tp_export.fetch import load_manifest
from tp_export.fetch.from_gguf import check_tokenizer, correct_tokenizer
from tp_runtime.errors import ModelFormatError
from tp_runtime.storage import system_errors


def _tokenizer_folder(folder: Path, **config: object) -> Path:
    """Write a byte-level tokenizer without merges, and a config.json that agrees with it."""
    vocabulary = {
        symbol: index for index, symbol in enumerate(["<bos>", "<eos>", *pre_tokenizers.ByteLevel.alphabet()])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": 0, "eos_token_id": 1}))
    return folder


def test_a_converted_tokenizer_is_checked(tmp_path: Path) -> None:
    manifest = load_manifest("gemma-3-270m")
    check_tokenizer(manifest, _tokenizer_folder(tmp_path))
    with pytest.raises(ModelFormatError, match=r"eos_token_id: .*got 0; wanted 1"):
        check_tokenizer(manifest, _tokenizer_folder(tmp_path, eos_token="<bos>"))
    with pytest.raises(ModelFormatError, match=r"style: .*completion, a chat template"):
        check_tokenizer(manifest, _tokenizer_folder(tmp_path, chat_template="{{ messages }}"))
    folder = _tokenizer_folder(tmp_path)
    lossy = json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": {"type": "Lowercase"}}
    (folder / "tokenizer.json").write_text(json.dumps(lossy))
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json: the tokenizer changes text that it encodes"):
        check_tokenizer(manifest, folder)


def test_a_correction_of_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json: the manifest corrects a file"):
        correct_tokenizer(load_manifest("smollm2-135m-instruct"), tmp_path)


def test_a_full_disk_in_safetensors_raises_the_systems_error() -> None:
    with pytest.raises(OSError) as caught, system_errors():
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(SafetensorError), system_errors():
        raise SafetensorError("InvalidHeader")
