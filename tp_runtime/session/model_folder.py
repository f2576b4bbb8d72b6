"""The exported model folder on the edge side: its description `patch_slots.json`, and the files that this one lists.

This module checks the sizes and digests of the files, description.py checks the description's form, and the storage
room checks names and links. This module does not read ONNX: `tp-export check`, which needs `onnx`, checks the graph.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path

from ..errors import ModelFormatError, RequestError
from ..patch import SlotKey
from ..storage import REEXPORT, atomic_file, checked_file, sha256_file
from .description import (
    FORMAT,
    KV,
    SLOTS_FILE,
    VERSION,
    DefaultPatch,
    DigestChange,
    FileRecord,
    Slot,
    parse_description,
)

# The folder of prepared.py belongs to this machine and not to the export, so it is not listed.
PREPARED = "prepared"
DEFAULT_FILE = "default_patch.safetensors"  # the default patch as a file, for runs that combine it with other patches

# Larger files (the weights) are hashed only on request, because reading them twice would double the time of a cold
# start.
ALWAYS_HASHED = 64 * 2**20
_SLOTS_FILE_CAP = 16 * 2**20


@dataclass(frozen=True)
class ModelFolder:
    """An exported model folder. `open` reads one; the exporter builds one and calls `write_slots_file`.

    The attributes are the keys of `patch_slots.json`, with the slots by (layer, site), and the resolved `path`.
    `digest_change` is None, and not in the file, if earlier versions gave the base the same digest.
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
    slots: dict[SlotKey, Slot]
    default_patch: DefaultPatch | None
    files: dict[str, FileRecord]
    digest_change: DigestChange | None = None

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> ModelFolder:
        """Read a folder's description and check the folder's files against it.

        Args:
            path: the folder.
            verify: whether to also hash the files above 64 MiB. Their sizes are checked in any case.

        Returns:
            The folder.

        Raises:
            ModelFormatError: the folder, its description or a file is missing, unreadable, truncated or altered.
            UnsafePathError: a file has an unsafe name, or its path leads outside the folder.
        """
        root = _real_folder(Path(path))
        folder = cls(path=root, **parse_description(_read_capped(checked_file(root, SLOTS_FILE))))
        for name, record in folder.files.items():
            _check_content(checked_file(root, name), name, record, verify)
        return folder

    @property
    def graph_digest(self) -> str:
        """The SHA-256 over the digests of the graph and its data files. A KV cache belongs to one graph digest."""
        graph = hashlib.sha256()
        for name in sorted(self.files):
            if name == "model.onnx" or name.endswith("_data"):
                graph.update(f"{name} {self.files[name].sha256}\n".encode())
        return graph.hexdigest()

    @property
    def unlisted(self) -> tuple[str, ...]:
        """The names in the folder that the description does not list. The runtime does not read these files."""
        return tuple(sorted(set(os.listdir(self.path)) - set(self.files) - {SLOTS_FILE, PREPARED}))

    def check_ids(self, tokens: Sequence[int]) -> None:
        """Check that there is at least one token and that every token is an id of the vocabulary.

        Raises:
            RequestError: `tokens` is empty, or a token is not an id of the vocabulary.
        """
        if not tokens:
            raise RequestError("the list of tokens is empty", field="tokens", got=0, wanted="at least one id")
        for token in tokens:
            if type(token) is not int and (isinstance(token, bool) or not isinstance(token, Integral)):
                raise RequestError(
                    "a token id is not an integer", field="tokens", got=repr(token), wanted="a whole number"
                )
        lowest, highest = min(tokens), max(tokens)
        if lowest < 0 or highest >= self.vocab_size:
            raise RequestError(
                "a token id is outside the vocabulary",
                field="tokens",
                got=lowest if lowest < 0 else highest,
                wanted=f"0..{self.vocab_size - 1}",
            )

    def to_json(self) -> str:
        """Return the text of `patch_slots.json`."""
        data = asdict(self)
        del data["path"]
        if self.digest_change is None:
            del data["digest_change"]
        data["slots"] = [
            {"layer": slot.layer, "site": slot.site, "in": slot.inputs, "out": slot.outputs}
            for slot in self.slots.values()
        ]
        return json.dumps({"format": FORMAT, "version": VERSION, **data}, indent=1, allow_nan=False) + "\n"


def write_slots_file(folder: ModelFolder) -> Path:
    """Write a folder's `patch_slots.json`, whole or not at all.

    Args:
        folder: the description; `describe_files` returns its `files`.

    Returns:
        The path of the written file.

    Raises:
        ModelFormatError: `ModelFolder.open` would refuse the description.
        UnsafePathError: the description lists a file name that `ModelFolder.open` would refuse.
        OSError: the disk is full or the folder cannot be written. No partial file is left behind.
    """
    text = folder.to_json().encode()
    parse_description(text)
    target = folder.path / SLOTS_FILE
    with atomic_file(target) as temporary:
        temporary.write_bytes(text)
    return target


def describe_files(path: str | Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Hash files for `patch_slots.json`.

    Args:
        path: the model folder.
        names: the files to list.

    Returns:
        A record for each name.

    Raises:
        ModelFormatError: the folder or a file is missing.
        UnsafePathError: `ModelFolder.open` would refuse a name or a file.
    """
    root = _real_folder(Path(path))
    found = {name: checked_file(root, name) for name in names}
    return {name: FileRecord(sha256_file(file), file.stat().st_size) for name, file in found.items()}


def _real_folder(path: Path) -> Path:
    try:
        root = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelFormatError(
            "there is no such model folder", field="path", got=path, wanted="a folder written by tp-export"
        ) from error
    if not root.is_dir():
        raise ModelFormatError(
            "the path is not a folder", field="path", got=path, wanted="a folder written by tp-export"
        )
    return root


def _read_capped(file: Path) -> bytes:
    if (size := file.stat().st_size) > _SLOTS_FILE_CAP:
        raise ModelFormatError(
            "the description is too large",
            field=SLOTS_FILE,
            got=f"{size} bytes",
            wanted=f"at most {_SLOTS_FILE_CAP} bytes",
            fix=REEXPORT,
        )
    return file.read_bytes()


def _check_content(file: Path, name: str, record: FileRecord, verify: bool) -> None:
    if (size := file.stat().st_size) != record.bytes:
        raise ModelFormatError(
            "the file has the wrong size" + (" (truncated)" if size < record.bytes else ""),
            field=name,
            got=f"{size} bytes",
            wanted=f"{record.bytes} bytes",
            fix=REEXPORT,
        )
    if (verify or size <= ALWAYS_HASHED) and (digest := sha256_file(file)) != record.sha256:
        raise ModelFormatError(
            "the file is not the one that was exported (its SHA-256 differs)",
            field=name,
            got=digest,
            wanted=record.sha256,
            fix=REEXPORT,
        )
