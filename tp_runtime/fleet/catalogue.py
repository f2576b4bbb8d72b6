"""The patches of a fleet's folder: all of them can be named, and a replica loads those that its requests name."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ..errors import PatchInUseError, TPError, printable
from ..model import PatchedModel
from ..patch import Patch
from ..serve import SUFFIX, Mark, ServedPatches, patch_files, require_name

log = logging.getLogger("tp_runtime.fleet")


class Catalogue(ServedPatches):
    """The patch files of a folder. A new or changed file can be named without a restart. Threads may share a catalogue.

    Args:
        model: the open model.
        name: the name of the model itself.
        folder: the folder.
    """

    def __init__(self, model: PatchedModel, name: str, folder: Path) -> None:
        super().__init__(model, name, None)
        self._model, self._where = model, folder
        self._known: dict[str, tuple[Mark, Patch]] = {}
        self._bad: dict[str, Mark] = {}  # the versions of files that cannot be served
        self._held: Counter[str] = Counter()  # how often the replica's multiplexing holds each name
        # It is reentrant because the end of a request, which lets patches go, may come at any line.
        self._own_lock = threading.RLock()

    def names(self) -> Mapping[str, Patch]:
        """Return the patches of the folder by name."""
        with self._own_lock:
            return {name: patch for name, (_mark, patch) in self._known.items()}

    def scan(self, settle: bool = True) -> None:
        """Read the files that are new or have changed, and forget those that are gone.

        A file that is still being written is damaged, and is read again once it has changed. A folder that cannot be
        listed, as while a volume is mounted again, changes nothing. A patch that a request holds stays loaded.
        """
        with self._own_lock:
            files = patch_files(self._where)
            if files is None:
                log.warning("the folder of patches cannot be read")
                return
            found = {file.removesuffix(SUFFIX): mark for file, mark in files.items()}
            for name in self._model.patches.keys() - self._held:
                self._try_unload(name)  # a request was using it when it was let go
            for gone in self._known.keys() - found.keys():
                del self._known[gone]
            for gone in self._bad.keys() - found.keys():
                del self._bad[gone]
            for name, mark in sorted(found.items()):
                self._read(name, mark)

    def hold(self, name: str) -> None:
        """Load a patch of the folder into the model, until it is let go as often as it was held.

        Raises:
            PatchError: it does not fit the model.
            KeyError: the folder has no such patch.
        """
        with self._own_lock:
            self._model.load_patch(self._known[name][1], name, replace=True)
            self._held[name] += 1

    def let_go(self, name: str) -> None:
        """Unload a patch as soon as nothing holds it and no request uses it."""
        with self._own_lock:
            self._held[name] -= 1
            if self._held[name] <= 0:  # it may have been let go and loaded again while a request still used it
                del self._held[name]
                self._try_unload(name)

    def _read(self, name: str, mark: Mark) -> None:
        known = self._known.get(name)
        if mark in (known and known[0], self._bad.get(name)):
            return
        self._bad[name] = mark
        try:
            require_name(name, self.base)
            patch = Patch.load(self._where / f"{name}{SUFFIX}")
            self._model.graph.bind(patch)  # what does not fit this model is not listed
            if name in self._held:
                self._model.load_patch(patch, name, replace=True)
            self._known[name] = mark, patch
            del self._bad[name]
        except (TPError, OSError) as error:
            log.warning("the patch %s is not served: %s", printable(name), printable(str(error)))

    def _try_unload(self, name: str) -> None:
        try:
            if name in self._model.patches:
                self._model.unload_patch(name)
        except PatchInUseError:
            pass  # the next scan tries again
