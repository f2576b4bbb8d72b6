"""This module writes patch files byte by byte, so that each file can have exactly one defect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.patches import random_config
from tp_runtime.errors import PatchError, PatchFormatError
from tp_runtime.patch import Patch

CONFIG = json.dumps(random_config().to_dict())
METADATA = {"format": "tp-patch", "version": "1", "config": CONFIG}
BIAS = "layers.0.mlp_out.bias"


def container(header: object, data: bytes = b"") -> bytes:
    """Return a safetensors file with exactly this header, which is a JSON object or its text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin=0, end=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def tensors(data=bytes(8), metadata=METADATA, **entries):
    """Return a patch file with these tensor entries; the default is one valid entry, a bias of two zeros."""
    named = {f"layers.0.mlp_out.{part}": value for part, value in (entries or {"bias": entry()}).items()}
    return container({"__metadata__": metadata, **named}, data)


def refused(tmp_path: Path, content: bytes, error: type[PatchError], match: str, name: str = "p.safetensors"):
    """Assert that loading the content raises exactly this error class, with every field of the message set."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error, match=match) as caught:
        Patch.load(path)
    assert type(caught.value) is error
    assert caught.value.field and caught.value.got is not None and caught.value.wanted and caught.value.fix
    assert len(str(caught.value)) < 1500


def malformed(tmp_path, content, match):
    """Assert that loading the content raises PatchFormatError."""
    refused(tmp_path, content, PatchFormatError, match)


def changed(
    content: bytes, name: str, dtype: str | None, shape: list[int] | None = None, raw: bytes | None = None
) -> bytes:
    """Return a valid patch file with another tensor of that name; without it, if `dtype` is None."""
    metadata, parts = unpacked(content)
    if dtype is None:
        del parts[name]
    else:
        old = parts.get(name, ("", [], b""))
        parts[name] = (dtype, old[1] if shape is None else shape, old[2] if raw is None else raw)
    return packed(metadata, parts)


def unpacked(content: bytes) -> tuple[dict[str, Any], dict[str, tuple[str, list[int], bytes]]]:
    """Return the metadata of a valid patch file with its config parsed, and each tensor's dtype, shape and bytes."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__")
    parts = {name: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for name, e in header.items()}
    return {**metadata, "config": json.loads(metadata["config"])}, parts


def packed(metadata: dict[str, Any], parts: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """Return the file that `unpacked` takes apart."""
    header: dict[str, Any] = {"__metadata__": {**metadata, "config": json.dumps(metadata["config"])}}
    position = 0
    for name, (dtype, shape, raw) in parts.items():
        header[name] = entry(position, position := position + len(raw), dtype, shape)
    return container(header, b"".join(raw for _, _, raw in parts.values()))
