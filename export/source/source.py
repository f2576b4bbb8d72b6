"""A source model: a local Hugging Face folder (fetched or your own) or a hub id, its text side and its digest.

The base digest says which model a patch belongs to. It covers what the weights compute and how text reaches them:
every tensor, the architecture's config, the tokenizer and the chat template, in a canonical order. Names of the
folder, versions of the tools that wrote it and file layout do not enter, so every export of one source has the same.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tp_runtime.errors import ModelFormatError
from tp_runtime.storage import parse_json_object, read_json_object
from tp_runtime.text import Style, TextCodec

_NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "LICENSE*", "*TERMS*"]
# Config keys that say who wrote the file or how to run the model, not what it computes.
_VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures"}


@dataclass(frozen=True)
class Source:
    """An opened source model.

    Attributes:
        path: its local folder.
        name: what to call the base model.
        config: its parsed config.json.
        codec: its tokenizer and chat template.
    """

    path: Path
    name: str
    config: dict[str, Any]
    codec: TextCodec

    @property
    def architecture(self) -> str:
        """transformers' model type: `llama`, `gemma3_text`, ..."""
        return str(self.config.get("model_type", ""))

    @property
    def style(self) -> Style:
        """`chat` or `completion`."""
        return self.codec.style

    @property
    def licence(self) -> str | None:
        """Licence of the base model, where the folder's source.json names it."""
        return _source_record(self.path).get("licence", {}).get("name")

    @cached_property
    def digest(self) -> str:
        """The base digest, 64 hex digits; reads every weight once."""
        config = {key: value for key, value in self.config.items() if key not in _VOLATILE}
        text = {
            "style": self.style,
            "template": self.codec.template_source,
            "tokenizer": _read_json(self.path / "tokenizer.json"),
        }
        sha = hashlib.sha256(b"tp-runtime base 1\n")
        for part in (config, text):
            sha.update(json.dumps(part, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        for header, content in _tensors(self.path):
            sha.update(header)
            sha.update(content)
        return sha.hexdigest()


def open_source(src: str | Path) -> Source:
    """Open a local Hugging Face folder, or a hub id (downloaded by huggingface_hub as the user has it configured).

    Raises:
        ModelFormatError: nothing is there, a file is missing, or the weights are not safetensors.
    """
    path = Path(src)
    if not path.is_dir():
        path = _from_hub(str(src))
    missing = [name for name in _NEEDED if not (path / name).is_file()]
    if missing:
        raise ModelFormatError(
            "not a Hugging Face model folder",
            field=str(path),
            got=f"no {', '.join(missing)}",
            wanted="config.json, tokenizer.json, tokenizer_config.json and *.safetensors",
            fix="save the model and a fast tokenizer there with save_pretrained",
        )
    record = _source_record(path)
    config = _read_json(path / "config.json")
    codec = TextCodec.from_folder(path, record.get("style"))
    return Source(path, str(record.get("name") or path.resolve().name), config, codec)


def load_model(source: Source, device: str = "cpu", dtype: str = "float32", *, offload: bool = False) -> Any:
    """The transformers model of a source in eval mode.

    Args:
        source: the base model.
        device: a torch device, or `map`: layers spread over the GPUs there are (accelerate's device map).
        dtype: of the weights, a torch dtype by name.
        offload: leave the layers' weights on disk and load each, in float32, while it runs (offload.py).

    Raises:
        ModelFormatError: the weights are missing or damaged.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    next(_tensors(source.path))  # names a missing file before transformers does, in one line
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # sdpa leaves out Gemma 2's soft caps and GPT-2's unusual scales without a word; None is transformers' own choice.
    config = source.config
    unusual = config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True)
    attention = "eager" if config.get("attn_logit_softcapping") or unusual else None
    if offload:
        from .offload import load_offloaded

        return load_offloaded(source.path, device, attention)
    spread = {"device_map": "auto"} if device == "map" else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=getattr(torch, dtype), attn_implementation=attention, local_files_only=True, **spread
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelFormatError(
            f"transformers cannot load it: {error}",
            field=str(source.path),
            fix="fetch or save the model again",
        ) from error
    model = model.eval().requires_grad_(False)
    return model if spread else model.to(device)


def _from_hub(name: str) -> Path:
    problem = ModelFormatError(
        "no such folder, and no such model on the hub that can be reached",
        field="SRC",
        got=name,
        wanted="a Hugging Face folder, or owner/name of a hub model",
        fix="tp-export fetch --list shows models that need no hub",
    )
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise problem
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from requests.exceptions import RequestException

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RequestException) as error:
        raise problem from error


def _source_record(path: Path) -> dict[str, Any]:
    """What `tp-export fetch` wrote about the folder; empty for any other."""
    file = path / "source.json"
    return _read_json(file) if file.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, ModelFormatError, "fetch the model again", lenient=True)


def _tensors(path: Path) -> Iterator[tuple[bytes, memoryview]]:
    """Every tensor of the folder's safetensors files in order of name: its name, dtype and shape, and its bytes."""
    entries = []
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view:
            size = int.from_bytes(view[:8], "little")
            try:
                header = parse_json_object(view[8 : 8 + size])
                end = max(
                    8 + size + int(entry["data_offsets"][1]) for k, entry in header.items() if k != "__metadata__"
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ModelFormatError("not a safetensors file", field=str(file), fix="fetch it again") from error
            if end != len(view):
                raise ModelFormatError(
                    "the file is truncated or has bytes of its own",
                    field=str(file),
                    got=f"{len(view)} bytes",
                    wanted=f"{end} bytes",
                    fix="delete it and fetch the model again",
                )
        entries += [(name, file, 8 + size, entry) for name, entry in header.items() if name != "__metadata__"]
    if not entries:
        raise ModelFormatError(
            "no safetensors weights",
            field=str(path),
            wanted="*.safetensors",
            fix="load the model with transformers and save_pretrained it: pickled weights are not read",
        )
    for name, file, base, entry in sorted(entries, key=lambda e: e[0]):
        start, stop = (base + int(offset) for offset in entry["data_offsets"])
        with (
            file.open("rb") as handle,
            mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view,
            memoryview(view) as whole,
            whole[start:stop] as content,
        ):
            yield f"{name} {entry['dtype']} {entry['shape']}\n".encode(), content
