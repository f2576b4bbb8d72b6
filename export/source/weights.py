"""The weights of a base model's folder: which files hold them, and which tensors these files hold.

The files are those that transformers loads: the one that config.json names in `transformers_weights`, or else
model.safetensors, or else the shards that model.safetensors.index.json lists. Other safetensors files in the folder,
such as Mistral's consolidated.safetensors, are *stray*. Only headers are read here, so this takes no time.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tp_runtime.errors import ModelFormatError, UnsafePathError, shortened
from tp_runtime.storage import check_name, parse_json_object

from .files import opened, read_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_AGAIN = "delete it and fetch the model again"
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file.

    Attributes:
        name: the tensor's name in the file.
        dtype: the name of its dtype in the format, such as "F32" or "BF16".
        shape: its shape.
        file: the path of the file.
        start: the position of the tensor's first byte in the file.
        stop: the position after its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def header(self) -> bytes:
        """The tensor's name, dtype and shape, as the base digest covers them."""
        return f"{self.name} {self.dtype} {list(self.shape)}\n".encode()


def loaded_tensors(folder: Path, config: Mapping[str, Any]) -> list[StoredTensor]:
    """Return the tensors that transformers loads, in order of name.

    Args:
        folder: the model's folder.
        config: the parsed config.json.

    Raises:
        ModelFormatError: a file is missing, is not a regular file or is damaged, the index contradicts its files, there
            is no tensor, or two files hold one of the same name.
        UnsafePathError: the index or config.json names a file outside the folder.
    """
    named = config.get("transformers_weights")
    if named is not None:
        check_name(str(named), "config.json transformers_weights")
    name = str(named) if named is not None else _SINGLE if os.path.lexists(folder / _SINGLE) else _INDEX
    if named is None and name == _INDEX and not os.path.lexists(folder / _INDEX):
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        raise ModelFormatError(
            "the folder has no safetensors weights under the names that transformers loads",
            field=str(folder),
            got=shortened(others) if others else "no *.safetensors",
            wanted=f"{_SINGLE}, or {_INDEX} and its shards",
            fix="load the model with transformers and save it with save_pretrained: pickled weights are not read",
        )
    tensors = _in_shards(folder, name) if name.endswith(".json") else stored_tensors([folder / name])
    _check_tensors(folder, tensors)
    return tensors


def stray_files(folder: Path, used: Iterable[Path]) -> list[Path]:
    """Return the folder's safetensors files that hold no weights of the model, sorted by name."""
    return sorted(set(folder.glob("*.safetensors")) - set(used))


def stored_tensors(files: Iterable[Path]) -> list[StoredTensor]:
    """Return every tensor of safetensors files, in order of name.

    Raises:
        ModelFormatError: a file is not a safetensors file, or is truncated.
    """
    return sorted((tensor for file in sorted(files) for tensor in _tensors_of(file)), key=lambda tensor: tensor.name)


def _check_tensors(folder: Path, tensors: Sequence[StoredTensor]) -> None:
    """Check that there are tensors, and each once: of two with one name it depends on the reader which one counts.

    Args:
        folder: the model's folder, for the error.
        tensors: the tensors in order of name.

    Raises:
        ModelFormatError: there is no tensor, or two files hold a tensor of one name.
    """
    if not tensors:
        raise ModelFormatError("the safetensors files hold no tensors", field=str(folder), fix=_AGAIN)
    for one, other in pairwise(tensors):
        if one.name == other.name:
            raise ModelFormatError(
                "two files hold a tensor of the same name",
                field=shortened([one.name]),
                got=f"{one.file.name}, {other.file.name}",
                wanted="every tensor in one file",
                fix="save the model again with save_pretrained",
            )


def contents(tensors: Iterable[StoredTensor]) -> Iterator[tuple[StoredTensor, memoryview]]:
    """Yield every tensor with its bytes. A view is valid until the next one is asked for."""
    for tensor in tensors:
        with (
            tensor.file.open("rb") as handle,
            mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view,
            memoryview(view) as whole,
            whole[tensor.start : tensor.stop] as content,
        ):
            yield tensor, content


def _in_shards(folder: Path, index: str) -> list[StoredTensor]:
    """Return the tensors of the shards that an index lists, after checking that each is where the index places it."""
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelFormatError(
            "the index does not list the files of the weights",
            field=str(folder / index),
            wanted='a "weight_map" from tensor names to file names',
            fix=_AGAIN,
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        try:
            check_name(name, f"{index} weight_map")
        except UnsafePathError as error:
            raise UnsafePathError(
                "the index names a file that is not in the model's folder",
                field=f"{index} weight_map",
                got=ascii(name),
                wanted="names of files in the folder",
                fix="do not use this folder unless you trust its source",
            ) from error
    missing = [name for name in names if not os.path.lexists(folder / name)]
    if missing:
        raise ModelFormatError(
            "files that the index lists are missing",
            field=str(folder / index),
            got=f"no {shortened(missing)}",
            wanted=f"{len(names)} files",
            fix="fetch the model again, completely",
        )
    tensors = stored_tensors([folder / name for name in names])
    held = {(tensor.name, tensor.file.name) for tensor in tensors}
    absent = sorted(name for name, file in weight_map.items() if (name, file) not in held)
    if absent:
        raise ModelFormatError(
            "tensors that the index lists are not in its files",
            field=str(folder / index),
            got=f"no {shortened(absent)}",
            wanted="every tensor in the file that the index names",
            fix=_AGAIN,
        )
    return tensors


def _tensors_of(file: Path) -> list[StoredTensor]:
    with opened(file) as handle:
        length = int.from_bytes(handle.read(8), "little")
        raw = handle.read(min(length, _MAX_HEADER))
        base, size = 8 + length, os.fstat(handle.fileno()).st_size
    tensors = []
    try:
        header = parse_json_object(raw)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = (int(offset) for offset in entry["data_offsets"])
            shape = tuple(int(length) for length in entry["shape"])
            if not 0 <= start <= stop or min(shape, default=0) < 0 or not str(entry["dtype"]).isidentifier():
                raise ValueError("a size or a dtype that no tensor has")
            name.encode()  # fails for half a surrogate pair, which JSON can hold
            tensors.append(StoredTensor(name, str(entry["dtype"]), shape, file, base + start, base + stop))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ModelFormatError("the file is not a safetensors file", field=str(file), fix=_AGAIN) from error
    if (end := max((tensor.stop for tensor in tensors), default=base)) != size:
        raise ModelFormatError(
            "the file is truncated or has extra bytes",
            field=str(file),
            got=f"{size} bytes",
            wanted=f"{end} bytes",
            fix=_AGAIN,
        )
    return tensors
