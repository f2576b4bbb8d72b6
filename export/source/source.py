"""A source model: a local Hugging Face folder (fetched or your own) or a hub id, with its tokenizer and its digest.

The base digest identifies the model that a patch belongs to. It covers everything that the weights compute and how text
reaches them: every tensor, the architecture's config, the tokenizer and the chat template, in a canonical order. It
does not depend on the folder's name, on the versions of the tools that wrote the folder, or on the file layout.
Therefore every export of one source has the same base digest.
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

from .tokenizer import EffectiveTokenizer, effective_tokenizer

_NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "LICENSE*", "*TERMS*"]
# Config keys that record who wrote the file or how to run the model. They do not change what the model computes.
_VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures"}


@dataclass(frozen=True)
class Source:
    """An opened source model.

    Attributes:
        path: its local folder.
        name: the name of the base model.
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
        return _source_record(self.path).get("licence", {}).get("name")

    @cached_property
    def digest(self) -> str:
        """The base digest, 64 hex digits; the first access reads every weight once."""
        config = {key: value for key, value in self.config.items() if key not in _VOLATILE}
        text = self.tokenizer.digest_text
        sha = hashlib.sha256(b"tp-runtime base 1\n")
        for part in (config, text):
            sha.update(json.dumps(part, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        for header, content in _tensors(self.path):
            sha.update(header)
            sha.update(content)
        return sha.hexdigest()


def open_source(src: str | Path) -> Source:
    """Open a local Hugging Face folder or a hub id.

    huggingface_hub downloads a hub id with the user's own configuration.

    Raises:
        ModelFormatError: neither the folder nor the hub id exists, or a file is missing or damaged.
    """
    path = Path(src)
    if not path.is_dir():
        path = _from_hub(str(src))
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
    config = _read_json(path / "config.json")
    tokenizer = effective_tokenizer(path, record.get("style"))
    return Source(path, str(record.get("name") or path.resolve().name), config, tokenizer)


def load_model(source: Source, device: str = "cpu", dtype: str = "float32", *, offload: bool = False) -> Any:
    """Return the transformers model of a source in eval mode.

    Args:
        source: the base model.
        device: a torch device, or `map` to spread the layers over all GPUs (accelerate's device map).
        dtype: the dtype of the weights, by its torch name.
        offload: whether the layers' weights stay on disk and each layer is loaded, in float32, only while it runs
            (offload.py).

    Raises:
        ModelFormatError: the weights are missing or damaged, or `offload` is set and there is no adapter.
        DeviceUnavailableError: `offload` is set together with the device `map`.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    next(_tensors(source.path))  # reports missing weights in one line, before transformers would
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # sdpa silently ignores Gemma 2's soft caps and GPT-2's unusual scales. None lets transformers choose.
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
            f"transformers cannot load the model: {error}",
            field=str(source.path),
            fix="fetch or save the model again",
        ) from error
    model = model.eval().requires_grad_(False)
    return model if spread else model.to(device)


def _from_hub(name: str) -> Path:
    problem = ModelFormatError(
        "there is no such folder, and the hub has no such model or cannot be reached",
        field="SRC",
        got=name,
        wanted="a Hugging Face folder, or owner/name of a hub model",
        fix="choose a model that needs no hub: tp-export fetch --list shows them",
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
    """Return the record that `tp-export fetch` wrote into the folder; empty for any other folder."""
    file = path / "source.json"
    return _read_json(file) if file.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, ModelFormatError, "fetch the model again", lenient=True)


def _tensors(path: Path) -> Iterator[tuple[bytes, memoryview]]:
    """Yield (name, dtype and shape as bytes; content) of every tensor in the safetensors files, in order of name."""
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
                raise ModelFormatError(
                    "the file is not a safetensors file", field=str(file), fix="fetch it again"
                ) from error
            if end != len(view):
                raise ModelFormatError(
                    "the file is truncated or has extra bytes",
                    field=str(file),
                    got=f"{len(view)} bytes",
                    wanted=f"{end} bytes",
                    fix="delete it and fetch the model again",
                )
        entries += [(name, file, 8 + size, entry) for name, entry in header.items() if name != "__metadata__"]
    if not entries:
        raise ModelFormatError(
            "the folder has no safetensors weights",
            field=str(path),
            wanted="*.safetensors",
            fix="load the model with transformers and save it with save_pretrained: pickled weights are not read",
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
