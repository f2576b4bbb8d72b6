"""The exported model folder as the edge sees it: `patch_slots.json`, and files that are the listed ones.

Knows nothing of ONNX: that the graph inside agrees with the description is checked where `onnx` is importable
(`tp-export check`). Here: the description, sizes and digests; names and links are safe_path's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelFormatError
from ..patch import SITES
from ..storage import REEXPORT, StrictJSONError, atomic_file, check_name, checked_file, parse_json_object

PRECISIONS = (
    *("fp32", "fp16", "bf16", "int8", "int4-symmetric", "int4-rtn", "int4-k-quant"),
    *("int4-symmetric-head4", "int4-rtn-head4"),
)
PREPARED = "prepared"  # what prepared.py makes: of this machine, not of the export, so it is not listed
DEFAULT_FILE = "default_patch.safetensors"  # the default patch, for runs that mix it with others
SLOTS_FILE = "patch_slots.json"
FORMAT = "tp-slots"
VERSION = 1

# Larger files (the weights) are hashed only on demand: reading them twice would double a cold start.
ALWAYS_HASHED = 64 * 2**20
_SLOTS_FILE_CAP = 16 * 2**20

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Slot:
    """A place where a patch can act, beside the linear layer `site` of `layer`."""

    layer: int
    site: str
    inputs: int
    outputs: int

    @property
    def name(self) -> str:
        """The prefix of the slot's tensors in the graph."""
        return f"tp.{self.layer}.{self.site}"


@dataclass(frozen=True)
class KV:
    """Shape and dtype of one layer's keys and values."""

    heads: int
    head_dim: int
    dtype: str


@dataclass(frozen=True)
class DefaultPatch:
    """The patch exported as the slots' defaults.

    Attributes:
        name, identity: the patch's.
        terms: the patches and strengths it was made of.
        repair: whether it makes up for what the folder's precision costs, and so is part of the base.
    """

    name: str
    identity: str
    terms: tuple[tuple[str, float], ...]
    repair: bool = False


@dataclass(frozen=True)
class FileRecord:
    """What a listed file must be."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class ModelFolder:
    """An exported model folder; `open` reads one, the exporter builds one and calls `write_slots_file`.

    Attributes are those of `patch_slots.json`, with slots by (layer, site) and `path` resolved.
    """

    path: Path
    architecture: str
    base_model: str
    base_digest: str
    precision: str
    style: str
    route: str
    layers: int
    vocab_size: int
    context_window: int
    kv: KV
    slots: dict[tuple[int, str], Slot]
    default_patch: DefaultPatch | None
    files: dict[str, FileRecord]

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> ModelFolder:
        """Reads a folder's description and checks its files against it.

        Args:
            path: the folder.
            verify: hash the files above 64 MiB too; their size is checked either way.

        Returns:
            The folder.

        Raises:
            ModelFormatError: something is missing, unreadable, truncated or altered.
            UnsafePathError: a file is named or lies where it must not.
        """
        root = _real_folder(Path(path))
        folder = _parse(root, _read_capped(checked_file(root, SLOTS_FILE)))
        for name, record in folder.files.items():
            _check_content(checked_file(root, name), name, record, verify)
        return folder

    @property
    def graph_digest(self) -> str:
        """SHA-256 over the digests of the graph and its data files; a KV cache belongs to it."""
        graph = hashlib.sha256()
        for name in sorted(self.files):
            if name == "model.onnx" or name.endswith("_data"):
                graph.update(f"{name} {self.files[name].sha256}\n".encode())
        return graph.hexdigest()

    @property
    def unlisted(self) -> tuple[str, ...]:
        """Names in the folder that the description does not list; nothing reads them."""
        return tuple(sorted(set(os.listdir(self.path)) - set(self.files) - {SLOTS_FILE, PREPARED}))

    def to_json(self) -> str:
        """The text of `patch_slots.json`."""
        data = asdict(self)
        del data["path"]
        data["slots"] = [
            {"layer": slot.layer, "site": slot.site, "in": slot.inputs, "out": slot.outputs}
            for slot in self.slots.values()
        ]
        return json.dumps({"format": FORMAT, "version": VERSION, **data}, indent=1, allow_nan=False) + "\n"


def write_slots_file(folder: ModelFolder) -> Path:
    """Writes a folder's `patch_slots.json`, whole or not at all.

    Args:
        folder: the description; `describe_files` gives its `files`.

    Returns:
        The file written.

    Raises:
        ModelFormatError: the description is one that `ModelFolder.open` would refuse.
        UnsafePathError: it lists a file name that `ModelFolder.open` would refuse.
        OSError: the disk is full or the folder cannot be written; no partial file is left.
    """
    text = folder.to_json().encode()
    _parse(folder.path, text)
    target = folder.path / SLOTS_FILE
    with atomic_file(target) as temporary:
        temporary.write_bytes(text)
    return target


def describe_files(path: str | Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Hashes files for `patch_slots.json`.

    Args:
        path: the model folder.
        names: the files to list.

    Returns:
        A record for each name.

    Raises:
        ModelFormatError: the folder or a file is missing.
        UnsafePathError: a name or a file is one that `ModelFolder.open` would refuse.
    """
    root = _real_folder(Path(path))
    found = {name: checked_file(root, name) for name in names}
    return {name: FileRecord(sha256_file(file), file.stat().st_size) for name, file in found.items()}


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hex, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _real_folder(path: Path) -> Path:
    try:
        root = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelFormatError(
            "no such model folder", field="path", got=path, wanted="a folder written by tp-export"
        ) from error
    if not root.is_dir():
        raise ModelFormatError("is not a folder", field="path", got=path, wanted="a folder written by tp-export")
    return root


def _read_capped(file: Path) -> bytes:
    if (size := file.stat().st_size) > _SLOTS_FILE_CAP:
        raise ModelFormatError(
            "is too large",
            field=SLOTS_FILE,
            got=f"{size} bytes",
            wanted=f"at most {_SLOTS_FILE_CAP}",
            fix=REEXPORT,
        )
    return file.read_bytes()


def _check_content(file: Path, name: str, record: FileRecord, verify: bool) -> None:
    if (size := file.stat().st_size) != record.bytes:
        raise ModelFormatError(
            "has the wrong size" + (" (truncated)" if size < record.bytes else ""),
            field=name,
            got=f"{size} bytes",
            wanted=f"{record.bytes} bytes",
            fix=REEXPORT,
        )
    if (verify or size <= ALWAYS_HASHED) and (digest := sha256_file(file)) != record.sha256:
        raise ModelFormatError(
            "is not the file that was exported (SHA-256 differs)",
            field=name,
            got=digest,
            wanted=record.sha256,
            fix=REEXPORT,
        )


def _parse(root: Path, raw: bytes) -> ModelFolder:
    try:
        data = parse_json_object(raw)
    except StrictJSONError as error:
        raise ModelFormatError(
            f"the description {error.problem}",
            field=SLOTS_FILE,
            got=f"{error.got!s:.200}",
            wanted=error.wanted,
            fix=REEXPORT,
        ) from error
    # Format and version first: another version has other keys, and is not "a file with unknown keys".
    if data.pop("format", None) != FORMAT:
        raise _bad("format", "something else", FORMAT)
    version = _integer(data.pop("version", None), "version")
    if version != VERSION:
        raise ModelFormatError(
            "is a version this runtime does not know",
            field=f"{SLOTS_FILE} version",
            got=version,
            wanted=VERSION,
            fix="update tp-runtime, or export the model again with this version of tp-export",
        )
    _keys(data, "", set(ModelFolder.__dataclass_fields__) - {"path"})
    layers = _integer(data["layers"], "layers")
    kv = _keys(data["kv"], "kv", {"heads", "head_dim", "dtype"})
    return ModelFolder(
        path=root,
        architecture=_text(data["architecture"], "architecture"),
        base_model=_text(data["base_model"], "base_model"),
        base_digest=_digest(data["base_digest"], "base_digest"),
        precision=_text(data["precision"], "precision", PRECISIONS),
        style=_text(data["style"], "style", ("chat", "completion")),
        route=_text(data["route"], "route", ("fused", "optimum")),
        layers=layers,
        vocab_size=_integer(data["vocab_size"], "vocab_size"),
        context_window=_integer(data["context_window"], "context_window"),
        kv=KV(
            heads=_integer(kv["heads"], "kv.heads"),
            head_dim=_integer(kv["head_dim"], "kv.head_dim"),
            dtype=_text(kv["dtype"], "kv.dtype", ("f32", "f16")),
        ),
        slots=_slots(data["slots"], layers),
        default_patch=_default_patch(data["default_patch"]),
        files=_files(data["files"]),
    )


def _slots(value: Any, layers: int) -> dict[tuple[int, str], Slot]:
    slots: dict[tuple[int, str], Slot] = {}
    for index, item in enumerate(_list(value, "slots")):
        where = f"slots[{index}]"
        _keys(item, where, {"layer", "site", "in", "out"})
        slot = Slot(
            layer=_integer(item["layer"], f"{where}.layer", 0, layers - 1),
            site=_text(item["site"], f"{where}.site", SITES),
            inputs=_integer(item["in"], f"{where}.in"),
            outputs=_integer(item["out"], f"{where}.out"),
        )
        if slots.setdefault((slot.layer, slot.site), slot) is not slot:
            raise _bad(where, f"{slot.name} a second time", "each slot once")
    return slots


def _default_patch(value: Any) -> DefaultPatch | None:
    if value is None:
        return None
    _keys(value, "default_patch", {"name", "identity", "terms", "repair"})
    if type(value["repair"]) is not bool:
        raise _bad("default_patch.repair", value["repair"], "true or false")
    terms = []
    for index, item in enumerate(_list(value["terms"], "default_patch.terms")):
        where = f"default_patch.terms[{index}]"
        # Any finite number: a written 1.0 may come back as the integer 1 from another JSON writer.
        if len(_list(item, where)) != 2 or type(item[1]) not in (int, float) or not abs(item[1]) < 1e308:
            raise _bad(where, item, "[identity, strength]")
        terms.append((_digest(item[0], where), float(item[1])))
    return DefaultPatch(
        name=_text(value["name"], "default_patch.name"),
        identity=_digest(value["identity"], "default_patch.identity"),
        terms=tuple(terms),
        repair=value["repair"],
    )


def _files(value: Any) -> dict[str, FileRecord]:
    if not isinstance(value, dict) or "model.onnx" not in value:
        raise _bad("files", value, "an object that lists model.onnx")
    files = {}
    for name, item in value.items():
        check_name(name, f"{SLOTS_FILE} files")
        _keys(item, f"files.{name}", {"sha256", "bytes"})
        files[name] = FileRecord(
            sha256=_digest(item["sha256"], f"files.{name}.sha256"),
            bytes=_integer(item["bytes"], f"files.{name}.bytes", 0, 2**63 - 1),
        )
    return files


def _keys(value: Any, field: str, wanted: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(field, value, "an object")
    if value.keys() != wanted:
        missing, unknown = sorted(wanted - value.keys()), sorted(value.keys() - wanted)
        raise _bad(field, f"missing {missing}, unknown {unknown}", f"the keys {sorted(wanted)}")
    return value


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise _bad(field, value, "a list")
    return value


def _text(value: Any, field: str, choices: tuple[str, ...] = ()) -> str:
    # Printable, because these texts go to terminals and logs.
    if not isinstance(value, str) or not value.isprintable() or not value:
        raise _bad(field, value, "printable text, not empty")
    if choices and value not in choices:
        raise _bad(field, value, "one of " + ", ".join(choices))
    return value


def _digest(value: Any, field: str) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise _bad(field, value, "a SHA-256 in 64 lower-case hex digits")
    return value


def _integer(value: Any, field: str, low: int = 1, high: int = 2**31 - 1) -> int:
    if type(value) is not int or not low <= value <= high:  # bool is an int in Python, not in this format
        raise _bad(field, value, f"an integer from {low} to {high}")
    return value


def _bad(field: str, got: object, wanted: object) -> ModelFormatError:
    return ModelFormatError(
        "does not describe a model folder",
        field=f"{SLOTS_FILE} {field}".rstrip(),
        got=f"{got!a:.200}",
        wanted=wanted,
        fix=REEXPORT,
    )
