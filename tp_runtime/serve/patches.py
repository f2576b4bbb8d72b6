"""The patches of a server: what the names in requests mean, and how patches are loaded and unloaded."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import reduce
from operator import add
from pathlib import Path

from ..errors import PatchInUseError, PatchTargetError, RequestError, shown
from ..model import PatchedModel
from ..patch import Patch

SUFFIX = ".safetensors"
_RESERVED = "+@/\\"  # characters that a name of a patch cannot have: they mean something in the name of a model
_MOST_PARTS = 8  # of a sum: each costs memory and time in every step


class UnknownModelError(PatchTargetError):
    """A request names a model or a patch that the server does not have."""


class ServedPatches:
    """The patches that requests can name. Any number of threads may use them.

    Args:
        model: the open model.
        name: the name of the model itself, without a patch.
        folder: the folder whose patch files requests may load; None allows none.

    Raises:
        RequestError: the model or a loaded patch has a name that requests cannot name.
    """

    def __init__(self, model: PatchedModel, name: str, folder: Path | None) -> None:
        self._model, self.base, self.folder = model, name, folder
        self._leaving: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        if not name or not name.isprintable():
            raise RequestError("the model has no name", field="name", got=shown(name), wanted="printable text")
        for loaded in model.patches:
            require_name(loaded, name)

    def names(self) -> Mapping[str, Patch]:
        """Return the patches that requests can name, by name."""
        leaving = self._leaving
        return {name: patch for name, patch in self._model.patches.items() if name not in leaving}

    def choice(self, model: str, patch: str | Mapping[str, float] | None) -> tuple[Patch | str | None, str]:
        """Return the patch that a request runs under, and its name with its strength for logs and metrics.

        Args:
            model: the name of the model, or an expression of patches: `pirate`, `pirate@0.5`, `pirate@0.5+french`.
            patch: the patch, if the request names it beside the model: such an expression, or strengths by name.

        Raises:
            UnknownModelError: the server has no such model or patch.
            RequestError: both fields name patches, or too many are added.
            PatchError: the patches cannot be scaled or added in this way.
        """
        if patch is not None and model != self.base:
            raise RequestError(
                "the request names patches in two fields",
                field="patch",
                got=shown(patch),
                wanted=f"null, or the model {self.base!r}",
                fix="name the patches in one of them",
            )
        field, parts = "model" if patch is None else "patch", self.parts(model, patch)
        if not parts:
            return None, self.base
        loaded = self.names()
        for name, _strength in parts:
            if name not in loaded:
                raise UnknownModelError(
                    "the server has no such model or patch",
                    field=field,
                    got=shown(name),
                    wanted=", ".join([self.base, *sorted(loaded)]),
                    fix="GET /v1/models lists what can be named",
                )
        if len(parts) == 1 and parts[0][1] == 1.0:
            return parts[0][0], parts[0][0]
        label = "+".join(f"{name}@{strength:g}" for name, strength in parts)
        return reduce(add, [strength * loaded[name] for name, strength in parts]), label

    def parts(self, model: str, patch: str | Mapping[str, float] | None) -> list[tuple[str, float]]:
        """Return the names and strengths that a request names, whether there are such patches or not.

        Raises:
            RequestError: a strength is not a number, or too many patches are added.
        """
        field = "model" if patch is None else "patch"
        if isinstance(patch, Mapping):
            parts = [(name, float(strength)) for name, strength in patch.items()]
        elif patch is None and model == self.base:
            parts = []
        else:
            parts = [_part(part, field) for part in (model if patch is None else patch).split("+", _MOST_PARTS)]
        if len(parts) > _MOST_PARTS:
            raise RequestError(
                "the sum has too many patches",
                field=field,
                got=f"more than {_MOST_PARTS}",
                wanted=f"at most {_MOST_PARTS}",
            )
        return parts

    # -- loading ----------------------------------------------------------------------------------------------------

    def load(self, name: str, file: str, *, replace: bool = False) -> Patch:
        """Load a file of the folder under a name, and return the patch.

        Args:
            name: the name.
            file: the name of the file, without a folder.
            replace: whether the patch may take the place of a loaded one of that name. Requests that run keep that one.

        Raises:
            RequestError: requests cannot name such a patch, or the file is not in the folder.
            PatchError: the name is taken, or the file is damaged or does not fit.
        """
        require_name(name, self.base)
        patch = Patch.load(self._path(file))
        self._model.load_patch(patch, name, replace=replace)
        with self._lock:
            self._leaving -= {name}
        return patch

    def unload(self, name: str) -> None:
        """Unload a patch.

        Raises:
            PatchTargetError: no patch of that name is loaded.
            PatchInUseError: a request is using it.
        """
        if name not in self.names():
            raise UnknownModelError(
                "no patch of that name is loaded",
                field="name",
                got=shown(name),
                wanted=", ".join(sorted(self.names())) or "a loaded patch, but none is loaded",
                fix="GET /v1/patches lists the loaded patches",
            )
        self._model.unload_patch(name)

    def retire(self, name: str) -> bool:
        """Keep new requests from a patch at once, and unload it as soon as no request uses it.

        Returns:
            Whether it is unloaded; if not, call this again later.
        """
        with self._lock:
            self._leaving |= {name}
        try:
            if name in self._model.patches:
                self._model.unload_patch(name)
        except PatchInUseError:
            return False
        except PatchTargetError:
            pass  # a request unloaded it meanwhile
        with self._lock:
            self._leaving -= {name}
        return True

    def _path(self, file: str) -> Path:
        """Return the path of a file of the folder. A symlink may lead to another place within the folder only."""
        assert self.folder is not None
        if not is_plain(file):
            raise RequestError(
                "the file is not a plain name", field="file", got=shown(file), wanted=f"NAME{SUFFIX}, without a folder"
            )
        path = self.folder / file
        try:
            inside = path.resolve().is_relative_to(self.folder.resolve())
        except (OSError, RuntimeError):  # a circle of symlinks
            inside = False
        if not inside:
            raise RequestError(
                "the file leads out of the folder", field="file", got=shown(file), wanted="a file within --patch-dir"
            )
        if not path.is_file():
            raise RequestError(
                "the folder has no such file", field="file", got=shown(file), wanted="a patch file in --patch-dir"
            )
        return path


def is_plain(file: str) -> bool:
    """Return whether a text is the plain, visible name of a patch file, without any folder."""
    plain = file.endswith(SUFFIX) and len(file.encode("utf-8", "replace")) < 256 and file.isprintable()
    return plain and not file.startswith(".") and "/" not in file and "\\" not in file


def require_name(name: str, base: str) -> None:
    """Raise RequestError unless a request can name a patch like this."""
    if not name or name == base or any(character in _RESERVED for character in name) or not name.isprintable():
        raise RequestError(
            "a request cannot name a patch like this",
            field="name",
            got=shown(name),
            wanted=f"printable text without {' '.join(_RESERVED)}, and not the model's own name",
        )


def _part(text: str, field: str) -> tuple[str, float]:
    name, at, strength = text.partition("@")
    try:
        return name, float(strength) if at else 1.0
    except ValueError:
        raise RequestError(
            "the strength is not a number", field=field, got=shown(text), wanted="NAME@STRENGTH, such as pirate@0.5"
        ) from None
