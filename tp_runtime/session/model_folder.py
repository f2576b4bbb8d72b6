"""The exported model folder on the edge side: its description `patch_slots.json`, and the files that this one lists.

This module checks the sizes and digests of the files, description.py checks the description's form, and the storage
room checks names and links. Whatever else the runtime reads of a folder comes from `ModelFolder.read`: only a listed
file, as the bytes that were hashed. This module does not read ONNX: graph_file.py checks which files the graph names,
and `tp-export check`, which needs `onnx`, checks the whole graph.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import BufferedReader
from numbers import Integral
from pathlib import Path

from ..errors import ModelFormatError, RequestError, UnsafePathError, shown
from ..patch import SlotKey
from ..storage import (
    ANY_FILE,
    MAX_JSON_BYTES,
    REEXPORT,
    UnreadableFileError,
    atomic_file,
    check_name,
    checked_file,
    open_regular,
    read_regular,
    sha256_file,
)
from .description import (
    FORMAT,
    GRAPH_FILE,
    KV,
    LARGEST_DESCRIPTION,
    SLOTS_FILE,
    VERSION,
    DefaultPatch,
    DigestChange,
    FileRecord,
    Slot,
    parse_description,
)
from .layer_kinds import Windowed

# The folder of prepared.py belongs to this machine and not to the export, so it is not listed.
PREPARED = "prepared"
DEFAULT_FILE = "default_patch.safetensors"  # the default patch as a file, for runs that combine it with other patches

# Larger files (the weights) are hashed only on request, because reading them twice would double the time of a cold
# start.
ALWAYS_HASHED = 64 * 2**20


@dataclass(frozen=True)
class ModelFolder:
    """An exported model folder. `open` reads one; the exporter builds one and calls `write_slots_file`.

    The attributes are the keys of `patch_slots.json`, with the slots by (layer, site), the resolved `path`, and whether
    the folder was opened with its large files `verified`.
    `digest_change` is None, and not in the file, if earlier versions gave the base the same digest. `windowed` is None,
    and not in the file, if the graph has one cache length for all layers: its layers are of one kind, or the route is
    `optimum`, or an earlier version exported it. `best` is the number of the largest logits that the graph also
    returns; it is None, and not in the file, if the graph is not made for decode steps on a device (device_step.py).
    `weights_digest` is the SHA-256 of the quantised weights, and None and
    not in the file unless they were calibrated.
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
    windowed: Windowed | None = None
    best: int | None = None
    weights_digest: str | None = None
    verified: bool = field(default=False, compare=False)

    @classmethod
    def open(cls, path: str | Path, verify: bool = False, digests: bool = True) -> ModelFolder:
        """Read a folder's description and check the folder's files against it.

        Args:
            path: the folder.
            verify: whether to also hash the files above 64 MiB. Their sizes are checked in any case.
            digests: whether to hash files now. With False only their sizes are checked, and `check_digests` must follow
                before anything of the folder is used.

        Returns:
            The folder.

        Raises:
            ModelFormatError: the folder, its description or a file is missing, unreadable, truncated or altered.
            UnsafePathError: a file has an unsafe name, or its path leads outside the folder.
        """
        root = _real_folder(Path(path))
        folder = cls(path=root, **parse_description(_read_description(root)), verified=verify)
        if digests:
            folder.check_digests()
        else:
            for name, record in folder.files.items():
                _check_size(root, name, record)
        return folder

    def check_digests(self) -> None:
        """Check the size of every file, and the SHA-256 of those up to 64 MiB or, with `verified`, of all.

        Raises:
            ModelFormatError, UnsafePathError: as for `open`.
        """
        for name, record in self.files.items():
            check_content(self.path, name, record, hash_large=self.verified)

    def read(self, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
        """Return the bytes of a listed file, after a check of their size and SHA-256.

        Args:
            name: the file's name.
            limit: the largest size in bytes that is read.

        Raises:
            ModelFormatError: the description does not list the file, or the file is missing, too large, or not the one
                that was exported.
            UnsafePathError: the path leads outside the folder or to something else than a file.
            OSError: the operating system refuses to read the file.
        """
        check_name(name, "file name")
        if name not in self.files:
            raise ModelFormatError(
                "the description does not list the file",
                field=name,
                wanted="one of " + ", ".join(sorted(self.files)),
                fix=REEXPORT,
            )
        return read_content(self.path, name, self.files[name], limit)

    @property
    def graph_digest(self) -> str:
        """The SHA-256 over the digests of the graph and its data files. A KV cache belongs to one graph digest."""
        graph = hashlib.sha256()
        for name in sorted(self.files):
            if name == GRAPH_FILE or name.endswith("_data"):
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
                    "a token id is not an integer", field="tokens", got=shown(token), wanted="a whole number"
                )
        lowest, highest = min(tokens), max(tokens)
        if lowest < 0 or highest >= self.vocab_size:
            raise RequestError(
                "a token id is outside the vocabulary",
                field="tokens",
                got=shown(lowest if lowest < 0 else highest),
                wanted=f"0..{self.vocab_size - 1}",
            )

    def check_length(self, length: int) -> None:
        """Raise RequestError unless the context window holds `length` positions."""
        if length > self.context_window:
            raise RequestError(
                "the context window cannot hold this many tokens",
                field="tokens",
                got=length,
                wanted=f"at most {self.context_window}",
                fix="shorten the prompt or the conversation",
            )

    def to_json(self) -> str:
        """Return the text of `patch_slots.json`."""
        data = asdict(self)
        del data["path"], data["verified"]
        for optional in ("digest_change", "windowed", "best", "weights_digest"):
            if data[optional] is None:
                del data[optional]
        data["slots"] = [
            {"layer": slot.layer, "site": slot.site, "in": slot.inputs, "out": slot.outputs}
            | ({} if slot.scale == 1 else {"scale": slot.scale})
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
    with atomic_file(target, replaces=ANY_FILE) as temporary:  # the name itself says that this is a description
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


def check_content(root: Path, name: str, record: FileRecord, *, hash_large: bool) -> None:
    """Check that a file of a folder has the recorded size and digest.

    Args:
        root: the folder, resolved.
        name: the file's name.
        record: the size and digest.
        hash_large: whether the digest of a file above 64 MiB is checked too.

    Raises:
        ModelFormatError: the file is missing or is another one.
        UnsafePathError: the name or the path is unsafe.
    """
    with _opened(root, name) as handle:
        size = os.fstat(handle.fileno()).st_size
        _require_size(name, size, record)
        if hash_large or size <= ALWAYS_HASHED:
            _require_digest(name, hashlib.file_digest(handle, "sha256").hexdigest(), record)


def read_content(root: Path, name: str, record: FileRecord, limit: int) -> bytes:
    """Return the bytes of a file of a folder. The arguments and errors are those of `check_content`.

    The digest is checked on the bytes that are returned, whatever the file's size. A file with more than `limit` bytes
    is refused.
    """
    if record.bytes > limit:
        raise ModelFormatError(
            "the file is too large", field=name, got=f"{record.bytes} bytes", wanted=f"at most {limit}", fix=REEXPORT
        )
    with _opened(root, name) as handle:
        _require_size(name, os.fstat(handle.fileno()).st_size, record)
        raw = handle.read(record.bytes)
    _require_digest(name, hashlib.sha256(raw).hexdigest(), record)
    return raw


def _check_size(root: Path, name: str, record: FileRecord) -> None:
    with _opened(root, name) as handle:
        _require_size(name, os.fstat(handle.fileno()).st_size, record)


@contextmanager
def _opened(root: Path, name: str) -> Iterator[BufferedReader]:
    try:
        with open_regular(checked_file(root, name)) as handle:
            yield handle
    except UnreadableFileError as error:  # the file was replaced after checked_file looked at it
        raise UnsafePathError(error.problem, field=name, got=error.got, wanted=error.wanted, fix=REEXPORT) from error


def _read_description(root: Path) -> bytes:
    try:
        return read_regular(checked_file(root, SLOTS_FILE), LARGEST_DESCRIPTION)
    except UnreadableFileError as error:
        raise ModelFormatError(
            error.problem, field=SLOTS_FILE, got=error.got, wanted=error.wanted, fix=REEXPORT
        ) from error


def _require_size(name: str, size: int, record: FileRecord) -> None:
    if size != record.bytes:
        raise ModelFormatError(
            "the file has the wrong size" + (" (truncated)" if size < record.bytes else ""),
            field=name,
            got=f"{size} bytes",
            wanted=f"{record.bytes} bytes",
            fix=REEXPORT,
        )


def _require_digest(name: str, digest: str, record: FileRecord) -> None:
    if digest != record.sha256:
        raise ModelFormatError(
            "the file is not the one that was exported (its SHA-256 differs)",
            field=name,
            got=digest,
            wanted=record.sha256,
            fix=REEXPORT,
        )
