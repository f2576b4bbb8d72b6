"""A folder of patch files that is watched: new and changed files are loaded, and patches whose files are gone leave."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import NamedTuple, Protocol

from ..errors import TPError, printable
from .patches import SUFFIX, ServedPatches, is_plain

log = logging.getLogger("tp_runtime.serve")

_SCAN_SECONDS = 1.0


class Mark(NamedTuple):
    """What tells two versions of a file apart."""

    inode: int
    size: int
    changed: int


class Watched(Protocol):
    """What is looked at once a second."""

    def scan(self, settle: bool = True) -> None:
        """Look once; see PatchFolder."""


class PatchFolder:
    """Keeps the patches of a server equal to the files of a folder. Only one thread at a time may scan.

    A patch has the name of its file. A changed file replaces its patch for new requests, and those that run keep the
    old one. A file that changes from one scan to the next is still being written and waits. A file that cannot be
    loaded is logged once, and the patch of an earlier version stays. A patch that came in another way is left alone.

    Args:
        patches: the patches of the server, and their folder.
    """

    def __init__(self, patches: ServedPatches) -> None:
        self._patches = patches
        self._before: dict[str, Mark] = {}  # the files of the last scan
        self._tried: dict[str, Mark] = {}  # the versions that were loaded, or could not be
        self._own: set[str] = set()  # the names of the patches that this object loaded
        self._leaving: set[str] = set()  # those of them whose files are gone, while requests use them
        self._missing = False

    def scan(self, settle: bool = True) -> None:
        """Look at the folder once.

        Args:
            settle: whether a new or changed file waits for a second scan that finds it unchanged.
        """
        folder = self._patches.folder
        if folder is None:
            return
        found = patch_files(folder)
        if found is None:  # the folder is gone, as while a volume is mounted again; this is no order to unload all
            if not self._missing:
                log.warning("the folder of patches cannot be read, so the patches stay as they are")
            self._missing = True
            return
        self._missing = False
        for name in sorted(self._own - {file.removesuffix(SUFFIX) for file in found}):
            self._own.discard(name)
            self._tried.pop(name + SUFFIX, None)
            self._leaving.add(name)
        for file in self._tried.keys() - found.keys():
            del self._tried[file]
        for name in sorted(self._leaving):
            if self._patches.retire(name):
                self._leaving.discard(name)
                log.info("unloaded the patch %s", printable(name))
        for file, mark in sorted(found.items()):
            settled = not settle or self._before.get(file) == mark
            if settled and self._tried.get(file) != mark:
                self._tried[file] = mark
                self._load(file)
        self._before = found

    def _load(self, file: str) -> None:
        name = file.removesuffix(SUFFIX)
        loaded = name in self._own or name in self._leaving
        try:
            self._patches.load(name, file, replace=loaded)
        except (TPError, OSError, MemoryError) as error:
            log.warning("the patch file %s was not loaded: %s", printable(file), printable(str(error)))
        else:
            self._own.add(name)
            self._leaving.discard(name)
            log.info("loaded the patch %s", printable(name))


async def watch(folder: Watched) -> None:
    """Scan a folder for ever. A scan that fails is logged, and the next one tries again."""
    while True:
        await asyncio.sleep(_SCAN_SECONDS)
        try:
            await asyncio.to_thread(folder.scan)
        except Exception:
            log.exception("the folder of patches could not be scanned")


def patch_files(folder: Path) -> dict[str, Mark] | None:
    """Return the patch files of a folder with their marks; None if the folder cannot be read."""
    found = {}
    try:
        for path in folder.iterdir():
            if is_plain(path.name):
                try:
                    status = path.stat()
                except OSError:
                    continue  # it went away meanwhile
                found[path.name] = Mark(status.st_ino, status.st_size, status.st_mtime_ns)
    except OSError:
        return None
    return found
