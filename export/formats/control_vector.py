"""Control vectors in the GGUF form of repeng and llama.cpp: one direction a layer, added to the residual stream.

`direction.N` is added to the output of block N, counted from 0: repeng's ControlModule adds it to what layer N returns,
llama.cpp's build_cvec to the residual after block il = N. That is the bias of `mlp_out` at layer N, before or behind a
post-norm alike. llama.cpp has no direction for block 0 (its reader refuses a file with `direction.0`); repeng has one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig

from tp_runtime.errors import PatchFormatError, PatchShapeError, PatchTargetError
from tp_runtime.patch import Delta, Patch
from tp_runtime.storage import atomic_file

_ARCHITECTURE = "controlvector"
_MAX_BYTES = 1 << 30  # 100 layers of 8,192 are 3 MB


def control_vector_parts(
    patch: Patch, sites: Collection[str] = ("mlp_out",)
) -> tuple[dict[int, NDArray[np.float32]], list[str], list[str]]:
    """What a control vector can carry of a patch, and what not.

    Args:
        patch: the patch.
        sites: whose bias is added to the block's output: `mlp_out`, and without a post-norm `down` too.

    Returns:
        Layer to direction [d]; names of the biases that it cannot carry; names of the pairs, which it never can.
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
        lost: names of the parts that `form` cannot carry.
        form: what is being written.
        fix: how to get a patch that it can carry.

    Raises:
        PatchTargetError: `lost` is not empty.
    """
    if lost:
        raise PatchTargetError(
            f"{form} cannot carry all of the patch {patch.name!r}",
            field="PATCH",
            got=", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else ""),
            wanted="parts that it can carry, and no others",
            fix=f"{fix}, or pass --lossy to leave these out",
        )


def write_control_vector(directions: Mapping[int, NDArray[np.float32]], architecture: str, out: Path) -> None:
    """Write a .gguf file that llama.cpp and repeng read, whole or not at all.

    Args:
        directions: layer (1 and up) to direction [d].
        architecture: the base's model type, for the file's hint.
        out: ends in .gguf; a file there is replaced.

    Raises:
        PatchTargetError: there is no direction.
        PatchFormatError: another suffix.
        OSError: the operating system's error; no file is left behind.
    """
    if out.suffix != ".gguf":
        raise PatchFormatError("the name of a control vector", field="OUT", got=out.name, wanted="*.gguf")
    if not directions:
        raise PatchTargetError(
            "nothing that a control vector can carry", field="PATCH", got="no bias of mlp_out on blocks 1 and up"
        )
    with atomic_file(out) as temporary:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", architecture)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(directions))
        for layer in sorted(directions):
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(directions[layer], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_control_vector(path: Path, config: Mapping[str, Any]) -> dict[tuple[int, str], Delta]:
    """Read a .gguf control vector as biases of `mlp_out`.

    Args:
        path: the file.
        config: the base's parsed config.json.

    Returns:
        (layer, "mlp_out") to a bias [d].

    Raises:
        PatchFormatError: damaged, not a control vector, or directions that are not float32 or float16.
        PatchTargetError: a tensor that is no direction.
        PatchShapeError: a layer or a size the base does not have.
    """
    reader = _open(path)
    layers, size = _sizes(config)
    deltas = {}
    for tensor in reader.tensors:
        prefix, _, number = tensor.name.partition(".")
        if prefix != "direction" or not number.isascii() or not number.isdigit():
            raise PatchTargetError(
                "a tensor is no direction", field=ascii(tensor.name), got="another name", wanted="direction.<layer>"
            )
        if tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            raise PatchFormatError(
                "unsupported type", field=tensor.name, got=tensor.tensor_type.name, wanted="F32 | F16"
            )
        if int(number) >= layers or tensor.data.shape != (size,):
            raise PatchShapeError(
                "the direction does not fit the base",
                field=tensor.name,
                got=f"layer {int(number)}, {list(tensor.data.shape)}",
                wanted=f"layers 0..{layers - 1}, [{size}]",
                fix="give the base model that the control vector was made for",
            )
        deltas[int(number), "mlp_out"] = Delta(bias=np.array(tensor.data, np.float32))
    count = reader.get_field(f"{_ARCHITECTURE}.layer_count")
    if not deltas or (count is not None and count.contents() != len(deltas)):
        raise PatchFormatError(
            "the directions are not all there",
            field=str(path),
            got=len(deltas),
            wanted="at least one" if count is None else count.contents(),
            fix="copy or export it again",
        )
    return deltas


def _open(path: Path) -> gguf.GGUFReader:
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        raise PatchFormatError("no such file, or too large for a control vector", field=str(path), wanted="a .gguf")
    try:
        reader = gguf.GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = None if field is None else field.contents()
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise PatchFormatError(
            f"not a GGUF file: {error}", field=str(path), wanted="a .gguf control vector", fix="copy it again"
        ) from error
    if architecture != _ARCHITECTURE:
        raise PatchFormatError(
            "a GGUF file, but not a control vector",
            field="general.architecture",
            got=repr(architecture),
            wanted=repr(_ARCHITECTURE),
            fix="for a LoRA give the peft folder, not its conversion",
        )
    return reader


def _sizes(config: Mapping[str, Any]) -> tuple[int, int]:
    """Layers and hidden size, whatever the architecture calls them."""
    parsed = AutoConfig.for_model(**config)
    return int(parsed.num_hidden_layers), int(parsed.hidden_size)
