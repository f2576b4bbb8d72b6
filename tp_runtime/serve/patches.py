"""The patches of a server: what names mean, and a folder whose patch files are loaded and watched."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from functools import reduce
from operator import add
from pathlib import Path

from ..errors import PatchInUseError, PatchTargetError, RequestError, TPError, printable, shown
from ..model import PatchedModel
from ..patch import Patch

log = logging.getLogger("tp_runtime.serve")

PATCH_SUFFIX = ".safetensors"
_RESERVED = "+@/\\"  # characters that a name of a patch cannot have: they mean something in the name of a model


class UnknownModelError(PatchTargetError):
    """A request names a model or a patch that the server does not have."""


class ServedPatches:
    """The patches that requests can name.

    Args:
        model: the open model.
        name: the name of the model itself, without a patch.
        folder: the folder whose patch files are loaded, by the names of the files; None watches nothing.
    """

    def __init__(self, model: PatchedModel, name: str, folder: Path | None) -> None:
        self._model, self.base, self._folder = model, name, folder
        self._seen: dict[str, tuple[int, int, int]] = {}  # a file's inode, size and time of change
        self._lock = threading.Lock()

    def names(self) -> Mapping[str, Patch]:
        """Return the loaded patches by name."""
        return self._model.patches

    def choice(self, model: str, patch: str | Mapping[str, float] | None) -> tuple[Patch | str | None, str]:
        """Return the patch that a request runs under, and its name for the metrics.

        Args:
            model: the name of the model, or an expression of patches: `pirate`, `pirate@0.5`, `pirate@0.5+french`.
            patch: the patch, if the request names it beside the model: such an expression, or strengths by name.

        Raises:
            UnknownModelError: the server has no such model or patch.
            RequestError: both fields name patches.
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
        parts = self.parts(model, patch)
        if not parts:
            return None, self.base
        loaded = self.names()
        for name, _strength in parts:
            if name not in loaded:
                raise UnknownModelError(
                    "the server has no such model or patch",
                    field="model" if patch is None else "patch",
                    got=shown(name),
                    wanted=", ".join([self.base, *sorted(loaded)]),
                    fix="GET /v1/models lists what can be named",
                )
        if len(parts) == 1 and parts[0][1] == 1.0:
            return parts[0][0], parts[0][0]
        label = "+".join(f"{name}@{strength:g}" for name, strength in parts)
        return reduce(add, [strength * loaded[name] for name, strength in parts]), label

    def parts(self, model: str, patch: str | Mapping[str, float] | None) -> list[tuple[str, float]]:
        """Return the names and strengths that a request names, whether they are loaded or not.

        Raises:
            RequestError: a strength is not a number.
        """
        if isinstance(patch, Mapping):
            return [(name, float(strength)) for name, strength in patch.items()]
        if patch is None and model == self.base:
            return []
        return [self._part(part, "model" if patch is None else "patch") for part in (patch or model).split("+")]

    def _part(self, text: str, field: str) -> tuple[str, float]:
        name, at, strength = text.partition("@")
        try:
            return name, float(strength) if at else 1.0
        except ValueError:
            raise RequestError(
                "the strength is not a number", field=field, got=shown(text), wanted="NAME@STRENGTH, such as pirate@0.5"
            ) from None

    # -- the folder -------------------------------------------------------------------------------------------------

    def load(self, name: str, file: str) -> None:
        """Load a file of the folder under a name.

        Raises:
            RequestError: the name cannot be named in a request, or the file is not a plain name in the folder.
            PatchError: the name is taken, or the file is damaged or does not fit.
        """
        assert self._folder is not None
        require_name(name, self.base)
        if Path(file).name != file or not file.endswith(PATCH_SUFFIX):
            raise RequestError(
                "the file is not a plain name",
                field="file",
                got=shown(file),
                wanted=f"NAME{PATCH_SUFFIX}, without a folder",
            )
        self._model.load_patch(self._folder / file, name)

    def unload(self, name: str) -> None:
        """Unload a patch; requests that run under it are not touched, and must have ended.

        Raises:
            PatchTargetError: no patch of that name is loaded.
            PatchInUseError: a request is using it.
        """
        self._model.unload_patch(name)

    def scan(self) -> None:
        """Load the files of the folder that are new or have changed, and unload those that are gone.

        A changed file replaces its patch for new requests; those that run keep the old one. A file that cannot be
        loaded is logged once, and the patch of an earlier version of it stays.
        """
        if self._folder is None:
            return
        with self._lock:
            for file in [file for file in self._seen if not (self._folder / file).exists()]:
                name = file.removesuffix(PATCH_SUFFIX)
                try:
                    if name in self.names():
                        self._model.unload_patch(name)
                        log.info("unloaded the patch %s", name)
                    del self._seen[file]
                except PatchInUseError:
                    continue  # the next scan tries again
            for path in sorted(self._folder.glob(f"*{PATCH_SUFFIX}")):
                try:
                    status = path.stat()
                except OSError:
                    continue  # it went away meanwhile
                mark = status.st_ino, status.st_size, status.st_mtime_ns
                if self._seen.get(path.name) == mark:
                    continue
                self._seen[path.name] = mark
                name = path.name.removesuffix(PATCH_SUFFIX)
                try:
                    require_name(name, self.base)
                    self._model.load_patch(path, name, replace=True)
                    log.info("loaded the patch %s", name)
                except (TPError, OSError) as error:
                    log.warning("the patch file %s was not loaded: %s", path.name, printable(str(error)))


def require_name(name: str, base: str) -> None:
    """Raise RequestError unless a request can name a patch like this."""
    if not name or name == base or any(character in _RESERVED for character in name) or not name.isprintable():
        raise RequestError(
            "a request cannot name a patch like this",
            field="name",
            got=shown(name),
            wanted=f"printable text without {' '.join(_RESERVED)}, and not the model's own name",
        )
