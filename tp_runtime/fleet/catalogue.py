"""The patches of a fleet's folder: all of them can be named, and a replica loads those that its requests name."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ..errors import PatchInUseError, TPError, printable
from ..model import PatchedModel
from ..patch import Patch
from ..serve import SUFFIX, ServedPatches, require_name

log = logging.getLogger("tp_runtime.fleet")


class Catalogue(ServedPatches):
    """The patch files of a folder. A new or changed file can be named without a restart.

    Args:
        model: the open model.
        name: the name of the model itself.
        folder: the folder.
    """

    def __init__(self, model: PatchedModel, name: str, folder: Path) -> None:
        super().__init__(model, name, None)
        self._model, self._where = model, folder
        self._known: dict[str, tuple[tuple[int, int, int], Patch]] = {}
        self._bad: dict[str, tuple[int, int, int]] = {}
        self._held: Counter[str] = Counter()  # how often the replica's multiplexing holds each name

    def names(self) -> Mapping[str, Patch]:
        """Return the patches of the folder by name."""
        return {name: patch for name, (_mark, patch) in self._known.items()}

    def scan(self, settle: bool = True) -> None:
        """Read the files that are new or have changed, and forget those that are gone.

        A file that is still being written is damaged, and is read again once it has changed.
        """
        for name in self._model.patches.keys() - self._held:
            self._try_unload(name)  # a request was using it when it was let go
        found = {path.name.removesuffix(SUFFIX): path for path in self._where.glob(f"*{SUFFIX}")}
        for name in self._known.keys() - found.keys():
            if self._try_unload(name):
                del self._known[name]
        for name, path in sorted(found.items()):
            try:
                status = path.stat()
                mark = status.st_ino, status.st_size, status.st_mtime_ns
                known = self._known.get(name)
                if mark in (known and known[0], self._bad.get(name)):
                    continue
                self._bad[name] = mark
                require_name(name, self.base)
                patch = Patch.load(path)
                if name in self._model.patches:
                    self._model.load_patch(patch, name, replace=True)
                self._known[name] = mark, patch
                del self._bad[name]
            except (TPError, OSError) as error:
                log.warning("the patch file %s is not served: %s", path.name, printable(str(error)))

    def hold(self, name: str) -> None:
        """Load a patch of the folder into the model.

        Raises:
            PatchError: it does not fit the model.
            KeyError: the folder has no such patch.
        """
        self._model.load_patch(self._known[name][1], name, replace=True)
        self._held[name] += 1

    def let_go(self, name: str) -> None:
        """Unload a patch as soon as no request uses it."""
        self._held[name] -= 1
        if self._held[name] <= 0:  # it may have been let go and loaded again while a request still used it
            del self._held[name]
            self._try_unload(name)

    def _try_unload(self, name: str) -> bool:
        try:
            if name in self._model.patches:
                self._model.unload_patch(name)
        except PatchInUseError:
            return False
        return True
