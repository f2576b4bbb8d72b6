"""Counts the bytes of weights that one decoded token reads: each matrix once, and no lookup table.

The count comes from the files. A tied embedding therefore counts once if the file stores it once, and a separate output
matrix counts if an exporter wrote one. The count does not include keys and values.
"""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

# These operators read a few rows of a table, not the whole table.
_LOOK_UPS = ("Gather", "GatherBlockQuantized", "RotaryEmbedding", "GroupQueryAttention")


def bytes_per_token(path: Path) -> int | None:
    """Return the bytes for a GGUF file, an ONNX folder or a Hugging Face folder; None if no package can read it."""
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
            # Two names for the same bytes count once.
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
