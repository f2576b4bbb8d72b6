"""Bytes of weights that one decoded token reads: all matrices once, tables that are looked up not at all.

Counted from the files, so that a tied embedding counts once where it is stored once, and an output matrix of its own
counts where an exporter wrote one. Keys and values are not in it.
"""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

# Operators that read a few rows of a table, not the table.
_LOOK_UPS = ("Gather", "GatherBlockQuantized", "RotaryEmbedding", "GroupQueryAttention")


def bytes_per_token(path: Path) -> int | None:
    """Of a GGUF file, an ONNX folder or a Hugging Face folder; None where the package that reads it is missing."""
    try:
        if path.suffix == ".gguf":
            return _gguf(path)
        return _onnx(path / "model.onnx") if (path / "model.onnx").exists() else _safetensors(path)
    except ImportError:
        return None


def _onnx(file: Path) -> int:
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    read = {
        name
        for node in graph.node
        for name in node.input
        if node.op_type not in _LOOK_UPS and not name.startswith("tp.")
    }
    sizes: dict[object, int] = {}
    for tensor in graph.initializer:
        if tensor.name in read:
            places = {entry.key: entry.value for entry in tensor.external_data}
            # The same bytes under two names are read from one place.
            where = (places["location"], places.get("offset", "0")) if places else tensor.name
            if places.get("length"):
                sizes[where] = int(places["length"])
            else:
                sizes[where] = prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return sum(sizes.values())


def _gguf(file: Path) -> int:
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


def _safetensors(folder: Path) -> int:
    sizes: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        sizes |= {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
    if "lm_head.weight" in sizes:
        sizes.pop("model.embed_tokens.weight", None)
    return sum(sizes.values())
