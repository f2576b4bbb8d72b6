"""Converts a GGUF file into a folder that transformers reads: safetensors in float32, config and tokenizer.

transformers' own conversion handles the weights and the configuration. Its tokenizer is close but not right for every
model (it assumes a Llama tokenizer for anything with architecture `llama`). The manifest states the corrections, and
the result is loaded once more and checked before anything else uses it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tp_runtime.errors import ModelFormatError, shortened
from tp_runtime.storage import parse_json_object, system_errors

from .manifest import Manifest

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Ordinary text that a tokenizer must decode unchanged: digits, several scripts, an emoji, runs of spaces.
_SAMPLE = "In 12345 days: naïve café, Ελλάδα, 日本語 🙂\n\tx  =  3.14;"


def convert_weights(gguf: Path, folder: Path) -> None:
    """Write model.safetensors, config.json and generation_config.json.

    Args:
        gguf: the path of the GGUF file.
        folder: the folder to write to.

    Raises:
        ModelFormatError: weights are missing from the file.
        OSError: the disk is full.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with _quiet(), system_errors():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, info = loaded
        if missing := sorted(info["missing_keys"]):  # transformers has drawn these at random
            raise ModelFormatError(
                "weights of the model are missing from the GGUF file",
                field=gguf.name,
                got=f"no {shortened(missing)}",
                wanted="every weight that its metadata describes",
            )
        # This is GGUF's title for the model, which transformers would otherwise write into config.json as a path.
        vars(model.config).pop("_model_name_or_path", None)
        model.save_pretrained(folder, safe_serialization=True)
    # safetensors writes through a private temporary file (0600). The file gets the mode of config.json, which the
    # user's umask decided.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def write_sampling(settings: Mapping[str, int | float], folder: Path) -> None:
    """Add the publisher's sampling settings, which a GGUF file does not hold, to generation_config.json."""
    path = folder / "generation_config.json"
    content = {**parse_json_object(path.read_bytes(), lenient=True), "do_sample": True, **settings}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def convert_tokenizer(gguf: Path, folder: Path, scratch: Path) -> None:
    """Write the tokenizer that transformers reads from the GGUF file, before any correction.

    Args:
        gguf: the path of the GGUF file.
        folder: the folder for tokenizer.json, tokenizer_config.json and chat_template.jinja.
        scratch: a folder for the files that are not kept.
    """
    from transformers import AutoTokenizer

    with _quiet():
        AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
        ).save_pretrained(scratch)
    # special_tokens_map.json is not kept: it repeats tokenizer_config.json and would override corrections.
    for name in _TOKENIZER_FILES:
        if (scratch / name).exists():
            (scratch / name).rename(folder / name)


def correct_tokenizer(manifest: Manifest, folder: Path) -> None:
    """Apply the manifest's corrections to the tokenizer's files.

    Args:
        manifest: the model's manifest.
        folder: the folder with the tokenizer's files.

    Raises:
        ModelFormatError: the file or the path of a correction does not exist.
    """
    for name, correction in manifest.tokenizer.corrections.items():
        path = folder / name
        if not path.exists():
            raise ModelFormatError("the manifest corrects a file that does not exist", field=name)
        document: dict[str, Any] = parse_json_object(path.read_bytes(), lenient=True)
        correction.apply(document)
        path.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def check_tokenizer(manifest: Manifest, folder: Path) -> None:
    """Load the finished tokenizer as a user will, and check the properties that every later step relies on.

    Args:
        manifest: the model's manifest.
        folder: the model folder.

    Raises:
        ModelFormatError: a special token's id differs from config.json, the chat template does not fit the manifest's
            style, or plain text does not survive encoding and decoding.
    """
    from transformers import AutoConfig, AutoTokenizer

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for name in ("bos_token_id", "eos_token_id"):
        got, wanted = getattr(tokenizer, name), getattr(config, name)
        if got != wanted:
            raise ModelFormatError("the tokenizer and config.json differ", field=name, got=got, wanted=wanted)
    if (tokenizer.chat_template is not None) != (manifest.style == "chat"):
        has = "a chat template" if tokenizer.chat_template else "no chat template"
        raise ModelFormatError("the style does not fit the tokenizer", field="style", got=f"{manifest.style}, {has}")
    back = tokenizer.decode(tokenizer.encode(_SAMPLE, add_special_tokens=False))
    if back != _SAMPLE:
        raise ModelFormatError(
            "the tokenizer changes text that it encodes and decodes", field="tokenizer.json", got=repr(back)
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings, which the manifest's corrections answer, but not its progress bars."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
