"""The patches beside a model: loaded by name, bound when first used, and which one is active where.

Knows nothing of text. A request resolves the patch that it names, runs under what is bound, and says that it uses it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from .errors import PatchInUseError, PatchTargetError
from .patch import Patch
from .session import BoundPatch, Graph

_KEPT_BINDINGS = 8  # of expressions such as 0.5 * p, which are bound on first use


class Active:
    """Stands for "the patch that is active here" where None means no patch."""

    def __repr__(self) -> str:
        return "ACTIVE"


ACTIVE: Final = Active()
PatchChoice = Patch | str | None | Active


@dataclass(eq=False)
class LoadedPatch:
    """A patch that was given a name, and how many requests and `patched` blocks use it right now."""

    name: str
    patch: Patch
    bound: BoundPatch
    users: int = 0


@dataclass(frozen=True)
class ResolvedPatch:
    """What a request runs under: the loaded patch it came from, if any, the patch, if known, and what is bound."""

    loaded: LoadedPatch | None
    patch: Patch | None
    bound: BoundPatch


class LoadedPatches:
    """Patches by name, for any number of threads.

    Args:
        graph: what they are bound to.
        default: what requests run under that name no patch.
    """

    def __init__(self, graph: Graph, default: BoundPatch) -> None:
        self._graph, self._default = graph, default
        self._loaded: dict[str, LoadedPatch] = {}
        self._recent: OrderedDict[tuple[Any, ...], BoundPatch] = OrderedDict()
        # Reentrant: a stream that was dropped is released by the garbage collector, in whichever line that runs.
        self.lock = threading.RLock()
        self._active: ContextVar[ResolvedPatch | None] = ContextVar("patch", default=None)

    def view(self) -> Mapping[str, Patch]:
        """The loaded patches by name."""
        with self.lock:
            return MappingProxyType({name: loaded.patch for name, loaded in self._loaded.items()})

    def add(self, name: str, patch: Patch, bound: BoundPatch) -> None:
        """Give a patch a name.

        Raises:
            PatchInUseError: the name is taken.
        """
        with self.lock:
            if name in self._loaded:
                raise PatchInUseError(
                    "the name is taken",
                    field="name",
                    got=repr(name),
                    wanted=f"none of {sorted(self._loaded)}",
                    fix="unload_patch it first, or load_patch(..., name='another')",
                )
            self._loaded[name] = LoadedPatch(name, patch, bound)

    def remove(self, name: str) -> None:
        """Forget a patch.

        Raises:
            PatchTargetError: no patch of that name is loaded.
            PatchInUseError: a request or a `patched` block is using it.
        """
        with self.lock:
            users = self.by_name(name).users
            if users:
                raise PatchInUseError(
                    "the patch is in use",
                    field="name",
                    got=f"{name!r}, used {users} times right now",
                    fix="finish or close the streams and leave the `with model.patched(...)` blocks that use it",
                )
            del self._loaded[name]

    @contextmanager
    def activate(self, resolved: ResolvedPatch) -> Iterator[None]:
        """Within the context, requests of this thread or task run under `resolved` unless they name another."""
        with self.using(resolved.loaded):
            token = self._active.set(resolved)
            try:
                yield
            finally:
                self._active.reset(token)

    def by_name(self, name: str) -> LoadedPatch:
        """The loaded patch of that name.

        Raises:
            PatchTargetError: there is none.
        """
        try:
            return self._loaded[name]
        except KeyError:
            raise PatchTargetError(
                "no patch of that name is loaded",
                field="patch",
                got=repr(name),
                wanted=", ".join(map(repr, list(self._loaded))) or "a loaded patch; there is none",
                fix="load_patch(path, name) first",
            ) from None

    def resolve(self, patch: PatchChoice, strength: float) -> ResolvedPatch:
        """What a request runs under; the strength applies to whatever that is.

        Raises:
            PatchError: the patch is not loaded or does not fit.
        """
        if isinstance(patch, Active):
            resolved = self._active.get() or ResolvedPatch(None, None, self._default)
        elif isinstance(patch, str):
            loaded = self.by_name(patch)
            resolved = ResolvedPatch(loaded, loaded.patch, loaded.bound)
        elif isinstance(patch, Patch):
            scaled = strength * patch
            return ResolvedPatch(None, scaled, self._bind(scaled))
        elif patch is None:
            resolved = ResolvedPatch(None, None, self._graph.base)
        else:
            raise not_a_patch(patch, "a name, a Patch, or None")
        if strength == 1.0:
            return resolved
        if resolved.patch is None:
            raise PatchTargetError(
                "a strength, and no patch it could scale",
                field="strength",
                got=strength,
                wanted="1.0, or a patch",
                fix="pass patch=",
            )
        scaled = strength * resolved.patch
        return ResolvedPatch(resolved.loaded, scaled, self._bind(scaled))

    def _bind(self, patch: Patch) -> BoundPatch:
        """Bind an expression, or find it bound: the last few are kept."""
        # The terms say what is bound; whether it may be bound here is the base's matter, which they leave out.
        key = (patch.terms, patch.config.base_digest, patch.config.precision)
        with self.lock:
            if key in self._recent:
                self._recent.move_to_end(key)
                return self._recent[key]
        bound = self._graph.bind(patch)
        with self.lock:
            self._recent[key] = bound
            while len(self._recent) > _KEPT_BINDINGS:
                self._recent.popitem(last=False)
        return bound

    @contextmanager
    def using(self, loaded: LoadedPatch | None) -> Iterator[None]:
        """Within the context `loaded` cannot be unloaded; PatchTargetError if it already was."""
        if loaded is None:
            yield
            return
        with self.lock:
            if self.by_name(loaded.name) is not loaded:
                raise PatchTargetError(
                    "the patch was unloaded before it was used, and its name given to another",
                    field="patch",
                    got=repr(loaded.name),
                    fix="start the request again",
                )
            loaded.users += 1
        try:
            yield
        finally:
            with self.lock:
                loaded.users -= 1


def not_a_patch(got: object, wanted: str) -> PatchTargetError:
    """The error for something that should have been a patch."""
    return PatchTargetError("not a patch", field="patch", got=type(got).__name__, wanted=wanted)
