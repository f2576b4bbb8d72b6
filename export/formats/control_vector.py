"""Control vectors in the GGUF form of repeng and llama.cpp: one direction per layer, added to the residual stream.

`direction.N` is added to the output of block N, counted from 0. repeng's ControlModule adds it to the value that layer
N returns, and llama.cpp's build_cvec adds it to the residual after block il = N. This is the bias of `mlp_out` at layer
N, in blocks with a post-norm and without one. llama.cpp has no direction for block 0 (its reader refuses a file with
`direction.0`); repeng has one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig

from tp_runtime.errors import PatchFormatError, PatchShapeError, PatchTargetError, library_errors, shown
from tp_runtime.patch import Delta, Patch, SlotKey
from tp_runtime.storage import atomic_file

from .gguf_kinds import CONTROL_VECTOR
from .gguf_kinds import CONTROL_VECTOR_ARCHITECTURE as _ARCHITECTURE

_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,4})")
_MAX_BYTES = 1 << 30  # 100 layers of 8,192 are 3 MB


def control_vector_parts(
    patch: Patch, sites: Collection[str] = ("mlp_out",)
) -> tuple[dict[int, NDArray[np.float32]], list[str], list[str]]:
    """Split a patch into the parts that a control vector can represent and the parts that it cannot.

    Args:
        patch: the patch.
        sites: the sites whose bias is added to the block's output: `mlp_out`, and `down` too if there is no post-norm.

    Returns:
        A mapping from layer to direction [d]; the names of the biases that a control vector cannot represent; the names
        of the low-rank pairs, which it can never represent.
    """
    patch.require_weights_only("control vector")
    directions: dict[int, NDArray[np.float32]] = {}
    biases, pairs = [], []
    for (layer, site), delta in patch.deltas.items():
        if delta.a is not None:
            pairs.append(f"the pair of layers.{layer}.{site}")
        if delta.bias is None:
            continue
        if site in sites and layer > 0:
            directions[layer] = directions[layer] + delta.bias if layer in directions else delta.bias
        else:
            biases.append(f"the bias of layers.{layer}.{site}")
    return directions, biases, pairs


def check_lossless(patch: Patch, lost: Sequence[str], form: str, fix: str) -> None:
    """Refuse to leave parts of a patch out.

    Args:
        patch: the patch.
        lost: the names of the parts that `form` cannot represent.
        form: the format that is being written.
        fix: an instruction for getting a patch that the format can represent.

    Raises:
        PatchTargetError: `lost` is not empty.
    """
    if lost:
        raise PatchTargetError(
            f"{form} cannot represent all of the patch {patch.name!r}",
            field="PATCH",
            got=", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else ""),
            wanted="only parts that it can represent",
            fix=f"{fix}, or pass --lossy to leave these out",
        )


def write_control_vector(directions: Mapping[int, NDArray[np.float32]], architecture: str, out: Path) -> None:
    """Write a .gguf file that llama.cpp and repeng can read, completely or not at all.

    Args:
        directions: a mapping from layer (1 and up) to direction [d].
        architecture: the base's model type, for the file's hint.
        out: the path of the file, which ends in .gguf. An existing file is replaced if it is a control vector.

    Raises:
        PatchTargetError: `directions` is empty.
        PatchFormatError: `out` does not end in .gguf.
        OutputError: `out` holds something that is not replaced.
        OSError: the operating system reports an error. No file is left behind.
    """
    if out.suffix != ".gguf":
        raise PatchFormatError(
            "the output file's name does not end in .gguf", field="OUT", got=out.name, wanted="*.gguf"
        )
    if not directions:
        raise PatchTargetError(
            "the patch has nothing that a control vector can represent",
            field="PATCH",
            got="no bias of mlp_out on blocks 1 and up",
        )
    with atomic_file(out, CONTROL_VECTOR) as temporary:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", architecture)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(directions))
        for layer in sorted(directions):
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(directions[layer], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_control_vector(path: Path, config: Mapping[str, Any]) -> dict[SlotKey, Delta]:
    """Read a .gguf control vector as biases of `mlp_out`.

    Args:
        path: the file.
        config: the base's parsed config.json.

    Returns:
        A mapping from (layer, "mlp_out") to a bias [d].

    Raises:
        PatchFormatError: the file is damaged or is not a control vector, or a direction is not float32 or float16.
        PatchTargetError: a tensor is not a direction.
        PatchShapeError: a direction is for a layer that the base does not have, or does not have the base's size.
    """
    reader = _open(path)
    layers, size = _sizes(config)
    deltas: dict[SlotKey, Delta] = {}
    for tensor in reader.tensors:
        if (match := _DIRECTION.fullmatch(tensor.name)) is None:
            raise PatchTargetError(
                "a tensor of the file is not a direction",
                field=ascii(tensor.name),
                got="another name",
                wanted="direction.<layer>, without leading zeros",
            )
        layer = int(match[1])
        if tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            raise PatchFormatError(
                "the direction has an unsupported type",
                field=tensor.name,
                got=tensor.tensor_type.name,
                wanted="F32 | F16",
            )
        if layer >= layers or tensor.data.shape != (size,):
            raise PatchShapeError(
                "the direction does not fit the base",
                field=tensor.name,
                got=f"layer {layer}, {list(tensor.data.shape)}",
                wanted=f"layers 0..{layers - 1}, [{size}]",
                fix="pass the base model that the control vector was made for",
            )
        deltas[layer, "mlp_out"] = Delta(bias=np.array(tensor.data, np.float32))
    # Readers ignore the count, and writers disagree on what it counts: the directions of the file, the blocks of the
    # model, or the blocks from 1 up to the last one with a direction.
    highest = max((layer for layer, _ in deltas), default=0)
    field = reader.get_field(f"{_ARCHITECTURE}.layer_count")
    count = len(deltas) if field is None else field.contents()
    if not deltas or type(count) is not int or count not in {len(deltas), layers, highest}:
        raise PatchFormatError(
            "directions are missing from the file",
            field=str(path),
            got=f"{len(deltas)} directions, {_ARCHITECTURE}.layer_count {shown(count)}",
            wanted=f"at least one, and as many as layer_count states, or a layer_count of {layers} like the base",
            fix="copy or export it again",
        )
    return deltas


def blocks_without_direction(deltas: Mapping[SlotKey, Delta], config: Mapping[str, Any]) -> list[int]:
    """Return the blocks from 1 on to which a control vector adds nothing, although llama.cpp could steer them."""
    return sorted(set(range(1, _sizes(config)[0])) - {layer for layer, _ in deltas})


def _open(path: Path) -> gguf.GGUFReader:
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        raise PatchFormatError(
            "the file does not exist or is too large for a control vector", field=str(path), wanted="a .gguf"
        )
    with library_errors(
        PatchFormatError,
        "the file is not a GGUF file",
        field=str(path),
        wanted="a .gguf control vector",
        fix="copy it again",
        also=(MemoryError,),  # sizes in a damaged file can be anything
    ):
        reader = gguf.GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = None if field is None else field.contents()
    if architecture != _ARCHITECTURE:
        raise PatchFormatError(
            "the GGUF file is not a control vector",
            field="general.architecture",
            got=shown(architecture),
            wanted=repr(_ARCHITECTURE),
            fix="for a LoRA, pass the PEFT folder, not its conversion to GGUF",
        )
    return reader


def _sizes(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of layers and the hidden size, whatever their names in the architecture's config."""
    parsed = AutoConfig.for_model(**config)
    return int(parsed.num_hidden_layers), int(parsed.hidden_size)
