"""A source model: a local Hugging Face folder (fetched or your own) or a hub id, with its tokenizer and its digest.

The base digest identifies the model that a patch belongs to. It covers everything that the weights compute and how text
reaches them: every tensor that is loaded, the architecture's config, the tokenizer and the chat template, in a
canonical order. It does not depend on the folder's name, on the versions of the tools that wrote the folder, on the
file layout, or on files that are not loaded. Therefore every export of one source has the same base digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tp_runtime.errors import ModelFormatError, shortened, shown
from tp_runtime.session import DigestChange
from tp_runtime.text import Style, TextCodec

from ..decoder import adapter_for
from .files import read_json
from .hub import download, hub_id
from .tokenizer import EffectiveTokenizer, effective_tokenizer
from .weights import StoredTensor, contents, loaded_tensors, stored_tensors, stray_files

_NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")
# Config keys that record who wrote the file or how to run the model. They do not change what the model computes.
_VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures"}
# Config keys under which tools say that the weights are quantised: transformers, older compressed-tensors, MLX.
_QUANTISED = ("quantization_config", "compression_config", "quantization")


@dataclass(frozen=True)
class Source:
    """An opened source model.

    Attributes:
        path: its local folder.
        name: the name of the base model, printable.
        config: its parsed config.json.
        tokenizer: its tokenizer and chat template, as transformers resolves them.
    """

    path: Path
    name: str
    config: dict[str, Any]
    tokenizer: EffectiveTokenizer

    @property
    def codec(self) -> TextCodec:
        """The codec of the model's text; its ids are those of transformers."""
        return self.tokenizer.codec

    @property
    def architecture(self) -> str:
        """The model type of transformers, such as `llama` or `gemma3_text`."""
        return str(self.config.get("model_type", ""))

    @property
    def style(self) -> Style:
        """The style of the model, `chat` or `completion`."""
        return self.codec.style

    @property
    def licence(self) -> str | None:
        """The licence of the base model, or None if the folder's source.json does not name it."""
        licence = _source_record(self.path).get("licence")
        name = licence.get("name") if isinstance(licence, dict) else None
        return name if isinstance(name, str) else None

    @cached_property
    def tensors(self) -> list[StoredTensor]:
        """The tensors of the weights, in order of name; the first access reads the headers of the files.

        Raises:
            ModelFormatError: a file is missing or damaged, there is no tensor, or two files hold one of the same name.
            UnsafePathError: the index names a file outside the folder.
        """
        return loaded_tensors(self.path, self.config)

    @cached_property
    def digest(self) -> str:
        """The base digest, 64 hex digits; the first access reads every weight once."""
        return self._digest(self.tokenizer.digest_text, self.tensors)

    @cached_property
    def digest_change(self) -> DigestChange | None:
        """The digest that earlier versions gave this folder, and why it differs; None if it does not differ.

        Each reason replaces the part of the digest that it is about by what earlier versions covered. A further reason
        belongs in this method, and needs nothing elsewhere.
        """
        text, tensors, reasons = self.tokenizer.digest_text, self.tensors, []
        stray = stray_files(self.path, (tensor.file for tensor in tensors))
        if stray:
            try:
                tensors = stored_tensors([*self.path.glob("*.safetensors")])
            except ModelFormatError:  # earlier versions refused this folder, so no patch has an earlier digest
                return None
            # The reason goes into patch_slots.json, where all text is printable.
            names = [repr(file.name)[1:-1] for file in stray]
            reasons.append(f"it covered files that are not loaded: {shortened(names)}")
        if self.tokenizer.reason is not None and self.tokenizer.digest_text_before is not None:
            text = self.tokenizer.digest_text_before
            reasons.append(self.tokenizer.reason)
        if not reasons or (before := self._digest(text, tensors)) == self.digest:
            return None
        return DigestChange(before, "; ".join(reasons))

    def _digest(self, text: dict[str, Any], tensors: Iterable[StoredTensor]) -> str:
        config = {key: value for key, value in self.config.items() if key not in _VOLATILE}
        sha = hashlib.sha256(b"tp-runtime base 1\n")
        for part in (config, text):
            sha.update(json.dumps(part, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        for tensor, content in contents(tensors):
            sha.update(tensor.header)
            sha.update(content)
        return sha.hexdigest()


def open_source(src: str | Path) -> Source:
    """Open a local Hugging Face folder or a hub id.

    The folder's config must be of an architecture that there is an adapter for, and of a model that is not quantised:
    this is checked here, so that no later step asks transformers for a class that only code in the folder could give.

    Raises:
        ModelFormatError: neither the folder nor the hub id exists, a file is missing or damaged, the architecture is
            unknown, the weights are quantised, the model's name is not printable, or its recorded style is unknown.
        UnsafePathError: tokenizer_config.json names a file outside the folder.
    """
    path = Path(src)
    if not path.is_dir():
        path = download(str(src))
    missing = [name for name in _NEEDED if not (path / name).is_file()]
    if missing:
        raise ModelFormatError(
            "the folder is not a Hugging Face model folder",
            field=str(path),
            got=f"no {', '.join(missing)}",
            wanted="config.json, tokenizer.json, tokenizer_config.json and *.safetensors",
            fix="save the model and a fast tokenizer there with save_pretrained",
        )
    record = _source_record(path)
    name = _name(path, record)
    config = read_json(path / "config.json")
    adapter_for(str(config.get("model_type", "")))
    _require_float(path, config)
    return Source(path, name, config, effective_tokenizer(path, _style(record)))


def _style(record: dict[str, Any]) -> Style | None:
    """Return the style that source.json names; None if it names none."""
    style: Style | None = record.get("style")
    if style not in ("chat", "completion", None):
        raise ModelFormatError(
            "the style of the model is unknown",
            field="source.json style",
            got=f"{style!a:.200}",
            wanted="chat or completion",
            fix="correct source.json",
        )
    return style


def _name(path: Path, record: dict[str, Any]) -> str:
    """Return the model's name: that of source.json, or the hub id, or the folder's name."""
    real = path.resolve()
    name = record.get("name") or hub_id(real) or real.name
    # The name goes into model folders and patches, and to terminals and logs.
    if not isinstance(name, str) or not name.isprintable() or not name:
        raise ModelFormatError(
            "the name of the model is not printable text",
            field="source.json name" if record.get("name") else "SRC",
            got=shown(name),
            wanted="a name without newlines and other control characters",
            fix="correct source.json" if record.get("name") else "rename the folder",
        )
    return name


def _require_float(path: Path, config: dict[str, Any]) -> None:
    for key in _QUANTISED:
        if found := config.get(key):
            method = found.get("quant_method") if isinstance(found, dict) else None
            raise ModelFormatError(
                "the model is quantised, and patches are fitted and exported from float weights",
                field=str(path / "config.json"),
                got=f"{key} {shown(method)}" if method else key,
                wanted=f"no {key}",
                fix="give the float model that it was made from; --precision quantises the export",
            )


def _source_record(path: Path) -> dict[str, Any]:
    """Return the record that `tp-export fetch` wrote into the folder; empty for any other folder."""
    file = path / "source.json"
    return read_json(file) if file.is_file() else {}
