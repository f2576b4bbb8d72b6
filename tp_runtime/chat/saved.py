"""The file of a saved chat: JSON with the messages, the system message, the patches and the digest of the base.

Keys and values are not in it: they belong to one machine and one patch, and the dialogue gives them again.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, get_args

from ..errors import ChatFormatError, PatchTargetError, RequestError, shortened, shown
from ..loaded_patches import ACTIVE, Active, LoadedPatches, PatchChoice, ResolvedPatch
from ..patch import Patch
from ..session import ModelFolder
from ..storage import (
    SHA256,
    Kind,
    StrictJSONError,
    UnreadableFileError,
    atomic_file,
    parse_json_object,
    read_regular,
)
from ..text import checked_messages
from .turns import Messages

_FORMAT = "tp-runtime chat"
_VERSION = 1
_KEYS = ("format", "version", "base_model", "base_digest", "system", "patch", "messages")
_PATCH_KEYS = ("choice", "name", "strength", "terms")
_MAX_BYTES = 2**26  # of a file; a context window of a million tokens is about a tenth of that
_MAX_TERMS = 256
_PROBE = {"role": "user", "content": "a"}  # the last message of a request has rules of its own, which no saved one has

Choice = Literal["base", "active", "named", "given"]
Terms = tuple[tuple[str, float], ...]


class Saved:
    """The type of SAVED, which selects the patch that a chat was saved under."""

    def __repr__(self) -> str:
        return "SAVED"


SAVED: Final = Saved()


@dataclass(frozen=True)
class SavedChat:
    """The contents of a saved chat.

    Attributes:
        base_model: the name of the base model, for people.
        base_digest: the digest of the base model.
        messages: the messages, without the system message.
        system: the system message.
        choice: how the patch was chosen: "base" for None, "active" for the one that was active, "named" by the name of
            a loaded patch, "given" as a Patch.
        name: the name that the patch was loaded under, or its own; None for the base.
        strength: the factor on the patch.
        terms: the identities and strengths of the patches whose sum the chat ran under.
    """

    base_model: str
    base_digest: str
    messages: Messages
    system: str | None
    choice: Choice
    name: str | None
    strength: float
    terms: Terms

    @classmethod
    def of(
        cls,
        folder: ModelFolder,
        messages: Messages,
        system: str | None,
        patch: PatchChoice,
        strength: float,
        resolved: ResolvedPatch,
    ) -> SavedChat:
        """Return the contents for a chat.

        Args:
            folder: the model.
            messages: the messages.
            system: the system message.
            patch: the patch as the chat names it.
            strength: the factor on it.
            resolved: the patch that this is now.
        """
        if isinstance(patch, Active):
            choice: Choice = "active"
        else:
            choice = "base" if patch is None else "named" if isinstance(patch, str) else "given"
        name = patch if isinstance(patch, str) else None if resolved.patch is None else resolved.patch.name
        terms = () if resolved.patch is None else resolved.patch.terms
        return cls(folder.base_model, folder.base_digest, messages, system, choice, name, float(strength), terms)

    def describe_patch(self) -> str:
        """Return the patches and their strengths in words."""
        if not self.terms:
            return "no patch"
        if len(self.terms) == 1:
            return f"{self.name or self.terms[0][0][:12]}@{self.terms[0][1]:g}"
        return f"{self.name}, the sum of " + ", ".join(f"{identity[:12]}@{factor:g}" for identity, factor in self.terms)

    def find_patch(self, patches: LoadedPatches, where: str) -> tuple[PatchChoice, float]:
        """Return the patch that the chat was saved under, as a request names it, and its strength.

        It is found by its contents, whatever name it is loaded under.

        Args:
            patches: the loaded patches.
            where: the file, for errors.

        Raises:
            PatchTargetError: the patch is neither loaded nor active, nor the sum of loaded patches.
        """
        active = patches.resolve(ACTIVE, 1.0).patch
        if not self.terms:
            return ACTIVE if self.choice == "active" and active is None else None, 1.0
        candidates: list[tuple[str | Active, Patch]] = list(patches.view().items())
        if active is not None:
            candidates.append((ACTIVE, active))
        # The patch that the chat named comes first, if it is still the same one.
        first: str | Active | None = ACTIVE if self.choice == "active" else self.name
        for choice, patch in sorted(candidates, key=lambda candidate: candidate[0] != first):
            if (strength := self._strength_of(patch)) is not None:
                return choice, strength
        parts = {patch.terms[0]: patch for _, patch in candidates if len(patch.terms) == 1}
        missing = [identity[:12] for identity, _ in self.terms if (identity, 1.0) not in parts]
        if missing:
            raise PatchTargetError(
                "the chat was saved under a patch that is not loaded",
                field=where,
                got=f"{self.describe_patch()} (not loaded: {shortened(missing)})",
                wanted="loaded patches of these identities",
                fix="load_patch(file) first, or pass patch= to go on under another one",
            )
        return reduce(add, [factor * parts[identity, 1.0] for identity, factor in self.terms]), 1.0

    def _strength_of(self, patch: Patch) -> float | None:
        """Return the strength at which a patch is the one that the chat was saved under; None if there is none."""
        if [identity for identity, _ in patch.terms] != [identity for identity, _ in self.terms]:
            return None
        pairs = [(own, wanted) for (_, own), (_, wanted) in zip(patch.terms, self.terms, strict=True)]
        for strength in (self.strength, pairs[0][1] / pairs[0][0]):
            if all(own * strength == wanted for own, wanted in pairs):
                return strength
        return None


# -- files -----------------------------------------------------------------------------------------------------


def write_chat(path: str | os.PathLike[str], chat: SavedChat) -> None:
    """Write a saved chat, whole or not at all. An existing file is replaced if it is one too.

    Raises:
        OutputError: `path` holds something else.
        RequestError: the chat is larger than what is read back, or holds a value that is not one of JSON, such as a
            number that is not finite or text that is not valid Unicode.
        OSError: the operating system refuses the write.
    """
    data = {
        "format": _FORMAT,
        "version": _VERSION,
        "base_model": chat.base_model,
        "base_digest": chat.base_digest,
        "system": chat.system,
        "patch": {
            "choice": chat.choice,
            "name": chat.name,
            "strength": chat.strength,
            "terms": [{"identity": identity, "strength": strength} for identity, strength in chat.terms],
        },
        "messages": list(chat.messages),
    }
    checked_messages([*chat.messages, _PROBE])  # as a load does; the error names the message
    try:
        raw = (json.dumps(data, ensure_ascii=False, allow_nan=False, indent=1) + "\n").encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(
            "the chat holds a value that JSON cannot state",
            field="messages",
            got=error,
            wanted="finite numbers of at most a few thousand digits, and text that is valid Unicode",
            fix="take turns back with undo() first",
        ) from error
    if len(raw) > _MAX_BYTES:
        raise RequestError(
            "the chat is too large for a file",
            field="messages",
            got=f"{len(raw)} bytes",
            wanted=f"at most {_MAX_BYTES} bytes",
            fix="take turns back with undo() first",
        )
    with atomic_file(path, SAVED_CHAT) as temporary:
        temporary.write_bytes(raw)


def read_chat(path: str | os.PathLike[str], folder: ModelFolder) -> SavedChat:
    """Read a saved chat.

    Args:
        path: the file.
        folder: the model to go on with.

    Raises:
        ChatFormatError: the file is missing or damaged, or of another version; or the chat is with another base model.
    """
    chat = _parse(path)
    if chat.base_digest != folder.base_digest:
        raise ChatFormatError(
            "the chat was saved with another base model",
            field=f"{path}: base_digest",
            got=f"{chat.base_digest} ({chat.base_model})",
            wanted=f"{folder.base_digest} ({folder.base_model})",
            fix="open the model that the chat was held with",
        )
    return chat


def _parse(path: str | os.PathLike[str]) -> SavedChat:
    if not isinstance(path, str | os.PathLike):
        raise ChatFormatError("the value is not a path", field="path", got=shown(path), wanted="a saved chat")
    where = os.fspath(path) or "path"
    try:
        data = parse_json_object(read_regular(path, _MAX_BYTES))
    except FileNotFoundError:
        _refuse(where, "the file is missing", "no file", "a file that save wrote")
    except UnreadableFileError as error:
        _refuse(where, error.problem, error.got, error.wanted)
    except OSError as error:
        _refuse(where, "the file cannot be read", error, "a file that save wrote")
    except StrictJSONError as error:
        _refuse(where, f"the file {error.problem}", error.got, error.wanted)
    if data.get("format") != _FORMAT:
        _refuse(f"{where}: format", "the file is not a saved chat", shown(data.get("format")), repr(_FORMAT))
    if type(data.get("version")) is not int or data["version"] != _VERSION:
        _refuse(f"{where}: version", "the version is unknown", shown(data.get("version")), str(_VERSION))
    _check_keys(where, data, _KEYS)
    for key in ("base_model", "base_digest"):
        _check(where, key, data[key], isinstance(data[key], str), "a string")
    system, messages = data["system"], data["messages"]
    _check(where, "system", system, system is None or isinstance(system, str), "a string or null")
    _check(where, "messages", messages, isinstance(messages, list), "a list of messages")
    try:
        checked_messages([*messages, _PROBE])
    except RequestError as error:
        _refuse(f"{where}: {error.field}", error.problem, error.got, error.wanted)
    for number, message in enumerate(messages):
        _check(
            where, f"messages[{number}].role", message["role"], message["role"] != "system", "another role than system"
        )
    return SavedChat(
        data["base_model"], data["base_digest"], tuple(messages), system, *_parse_patch(where, data["patch"])
    )


def _parse_patch(where: str, patch: Any) -> tuple[Choice, str | None, float, Terms]:
    _check(where, "patch", patch, isinstance(patch, dict), "an object")
    _check_keys(f"{where}: patch", patch, _PATCH_KEYS)
    choice, name, strength, terms = (patch[key] for key in _PATCH_KEYS)
    _check(where, "patch.choice", choice, choice in get_args(Choice), f"one of {get_args(Choice)}")
    _check(where, "patch.name", name, name is None or isinstance(name, str), "a string or null")
    _check(where, "patch.strength", strength, _is_strength(strength) or strength == 0, "a number")
    _check(where, "patch.terms", terms, isinstance(terms, list) and len(terms) <= _MAX_TERMS, "a list of patches")
    _check(where, "patch.terms", terms, choice != "base" or not terms, "an empty list, because the choice is base")
    parsed = []
    for number, term in enumerate(terms):
        valid = isinstance(term, dict) and term.keys() == {"identity", "strength"}
        valid = valid and isinstance(term["identity"], str) and SHA256.fullmatch(term["identity"]) is not None
        valid = valid and _is_strength(term["strength"])
        wanted = "an identity (a SHA-256) and a strength other than 0"
        _check(where, f"patch.terms[{number}]", term, valid, wanted)
        parsed.append((term["identity"], float(term["strength"])))
    return choice, name, float(strength), tuple(parsed)


def _is_strength(value: object) -> bool:
    """Return whether a value is a strength that is not zero; see Patch."""
    return type(value) in (int, float) and 1e-30 <= abs(value) <= 1e30  # type: ignore[arg-type]


def _check_keys(where: str, data: dict[str, Any], keys: tuple[str, ...]) -> None:
    missing, unknown = [key for key in keys if key not in data], sorted(data.keys() - set(keys))
    if missing or unknown:
        problem = (
            f"the key {missing[0]!r} is missing" if missing else "the file has a key that this version does not know"
        )
        _refuse(where, problem, shortened([repr(key) for key in data], 8), ", ".join(keys))


def _check(where: str, key: str, value: object, valid: bool, wanted: str) -> None:
    if not valid:
        _refuse(f"{where}: {key}", "the value is malformed", shown(value), wanted)


def _refuse(field: str, problem: str, got: object, wanted: object) -> NoReturn:
    fix = "load a file that this version of tp-runtime saved"
    raise ChatFormatError(problem, field=field, got=got, wanted=wanted, fix=fix)


def _no_chat(path: Path) -> str | None:
    """Return why a file is not a saved chat; None if it is one."""
    return None if parse_json_object(read_regular(path, _MAX_BYTES)).get("format") == _FORMAT else "another JSON file"


SAVED_CHAT = Kind("a saved chat", _no_chat)
