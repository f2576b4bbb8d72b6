"""The patches loaded for a model: this module reads and checks them, stores them by name, and tracks which is active.

This module does not handle text. A request resolves the patch that it names, runs under the bound patch, and marks the
loaded patch as in use while it runs.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from .errors import PatchFormatError, PatchInUseError, PatchTargetError, RequestError, require_flag, shown
from .patch import Patch
from .session import BoundPatch, Graph, ProbeCheck, Use, Uses, check_probe, not_a_patch

_KEPT_BINDINGS = 8  # bound expressions such as 0.5 * p to keep; they are bound on first use


class Active:
    """The type of ACTIVE, which selects the patch that is active here. None, in contrast, selects no patch."""

    def __repr__(self) -> str:
        return "ACTIVE"


ACTIVE: Final = Active()
PatchChoice = Patch | str | None | Active


@dataclass(eq=False)
class LoadedPatch:
    """A patch loaded under a name.

    Attributes:
        name: the name that requests select it by.
        patch: the patch.
        bound: the patch as bound to the graph.
        uses: the requests and `patched` blocks that use it right now.
    """

    name: str
    patch: Patch
    bound: BoundPatch
    uses: Uses = field(default_factory=Uses)


@dataclass(frozen=True)
class ResolvedPatch:
    """The patch that a request runs under.

    Attributes:
        loaded: the loaded patch that it comes from; None if it does not come from a loaded patch.
        patch: the patch itself; None for the base model.
        bound: the patch as bound to the graph.
    """

    loaded: LoadedPatch | None
    patch: Patch | None
    bound: BoundPatch


@dataclass(eq=False)
class _Block:
    """A `patched` block.

    Attributes:
        resolved: the patch that is active in the block.
        outer: the block that is active again after this one; None if there is none.
    """

    resolved: ResolvedPatch
    outer: _Block | None


class LoadedPatches:
    """The loaded patches by name. Any number of threads may use them.

    Args:
        graph: the graph that the patches are bound to.
        default: the bound patch for requests that name no patch: the graph's default or its base.
    """

    def __init__(self, graph: Graph, default: BoundPatch) -> None:
        self._graph = graph
        self._default = ResolvedPatch(None, graph.default_patch if default is graph.default else None, default)
        self._loaded: dict[str, LoadedPatch] = {}
        self._recent: OrderedDict[tuple[Any, ...], BoundPatch] = OrderedDict()
        # The lock is reentrant because the garbage collector may release a dropped stream at any line, including one
        # that holds the lock.
        self.lock = threading.RLock()
        self._active: ContextVar[_Block | None] = ContextVar("patch", default=None)

    def view(self) -> Mapping[str, Patch]:
        """Return the loaded patches by name, read-only."""
        with self.lock:
            return MappingProxyType({name: loaded.patch for name, loaded in self._loaded.items()})

    def load(self, patch: str | Path | Patch, name: str | None, check: bool, replace: bool) -> str:
        """Read a patch, check it, and store it under a name; an error leaves the loaded patches unchanged.

        Args:
            patch: the patch, or the path of its file.
            name: the name; None takes the patch's own.
            check: whether to run the patch's probe too.
            replace: whether it may take the place of another patch of that name.

        Returns:
            The name.

        Raises:
            PatchInUseError: the name is taken, and `replace` is not set.
            PatchError: the file is damaged or the patch does not fit the graph; or `check` is set, and the patch has no
                probe or the device does not reproduce it.
            RequestError: the name is not a string, or `check` or `replace` is not a boolean.
        """
        require_flag("check", check)
        require_flag("replace", replace)
        if isinstance(patch, str | os.PathLike):
            patch = Patch.load(patch)
        if not isinstance(patch, Patch):
            raise not_a_patch(patch, "a Patch, or the path of its file")
        name = patch.name if name is None else name
        bound = self._graph.bind(patch)
        if check:
            _require_live(patch, check_probe(self._graph, patch))
        self.add(name, patch, bound, replace)
        return name

    def check(self, patch: Patch | str) -> ProbeCheck:
        """Run the probe of a loaded patch or of any other.

        Raises:
            PatchFormatError: the patch has no probe.
            PatchError: the patch is not loaded or does not fit.
        """
        if isinstance(patch, str):
            patch = self.by_name(patch).patch
        if not isinstance(patch, Patch):
            raise not_a_patch(patch, "the name of a loaded patch, or a Patch")
        return check_probe(self._graph, patch)

    def add(self, name: str, patch: Patch, bound: BoundPatch, replace: bool = False) -> None:
        """Store a bound patch under a name.

        Args:
            name: the name.
            patch: the patch.
            bound: the patch as bound to the graph.
            replace: whether it may take the place of another patch of that name. Requests that run keep that one.

        Raises:
            RequestError: the name is not a string.
            PatchInUseError: the name is taken, and `replace` is not set.
        """
        if not isinstance(name, str):
            raise RequestError("the name is not a string", field="name", got=shown(name), wanted="a str")
        with self.lock:
            if name in self._loaded and not replace:
                raise PatchInUseError(
                    "the name is taken",
                    field="name",
                    got=shown(name),
                    wanted=f"none of {sorted(self._loaded)}",
                    fix="call unload_patch first, or load_patch(..., name='another') or load_patch(..., replace=True)",
                )
            before = self._loaded.get(name)
            self._loaded[name] = LoadedPatch(name, patch, bound)
            if before is not None and before.bound.key != bound.key:
                self._graph.release(before.bound)

    def remove(self, name: str) -> None:
        """Remove a patch.

        Raises:
            PatchTargetError: no patch of that name is loaded.
            PatchInUseError: a request or a `patched` block is using it.
        """
        with self.lock:
            users = len(self.by_name(name).uses)
            if users:
                raise PatchInUseError(
                    "the patch is in use",
                    field="name",
                    got=f"{name!r}, used {users} times right now",
                    fix="finish or close its streams, and leave its `with model.patched(...)` blocks",
                )
            self._graph.release(self._loaded.pop(name).bound)

    @contextmanager
    def activate(self, resolved: ResolvedPatch) -> Iterator[None]:
        """Within the context, requests of this thread or task run under `resolved` unless they name another."""
        block = _Block(resolved, self._active.get())
        with self.using(resolved.loaded):
            # An interrupt may arrive at any line. There are two `finally`, because it may arrive at the first one too,
            # and a block that stays active would change every later request of the thread.
            try:
                try:
                    self._active.set(block)
                    yield
                finally:
                    self._leave(block)
            finally:
                self._leave(block)

    def _leave(self, block: _Block) -> None:
        """End a block in this context. Blocks may end in any order; leaving a block again has no effect."""
        inner = self._active.get()
        if inner is block:
            self._active.set(block.outer)
        while inner is not None:
            if inner.outer is block:
                inner.outer = block.outer
            inner = inner.outer

    def by_name(self, name: str) -> LoadedPatch:
        """Return the loaded patch of that name.

        Raises:
            PatchTargetError: no patch of that name is loaded.
        """
        try:
            return self._loaded[name]
        except (KeyError, TypeError):  # the TypeError is that of a value that cannot be a key, such as a list
            raise PatchTargetError(
                "no patch of that name is loaded",
                field="patch",
                got=shown(name),
                wanted=", ".join(map(repr, list(self._loaded))) or "a loaded patch, but none is loaded",
                fix="load_patch(path, name) first",
            ) from None

    def resolve(self, patch: PatchChoice, strength: float) -> ResolvedPatch:
        """Return the patch that a request runs under.

        Args:
            patch: the patch that the request names.
            strength: a factor on the patch that the request names, that `patched` activated, or that is the default of
                the session. The base only has strength 1.

        Raises:
            PatchError: the patch is not loaded or does not fit, or a strength is given and there is no patch to scale.
        """
        if isinstance(patch, Active):
            active = self._active.get()
            resolved = self._default if active is None else active.resolved
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
        if isinstance(strength, Real) and strength == 1.0:
            return resolved
        if resolved.patch is None:
            raise PatchTargetError(
                "a strength is given, but there is no patch to scale",
                field="strength",
                got=shown(strength),
                wanted="1.0, or a patch",
                fix="pass patch=",
            )
        scaled = strength * resolved.patch
        return ResolvedPatch(resolved.loaded, scaled, self._bind(scaled))

    def _bind(self, patch: Patch) -> BoundPatch:
        """Bind an expression, or return the binding of an earlier call; the last few bindings are kept."""
        # The terms identify the values that are bound. Whether the patch may be bound to this graph depends on its base
        # digest and its quantised weights, and a request's system message on where its entries stand. The terms leave
        # these out.
        config = patch.config
        key = (patch.terms, config.base_digest, config.precision, config.weights_digest, patch.before_system)
        with self.lock:
            if key in self._recent:
                self._recent.move_to_end(key)
                return self._recent[key]
        bound = self._graph.bind(patch)
        with self.lock:
            self._recent[key] = bound
            while len(self._recent) > _KEPT_BINDINGS:
                _key, oldest = self._recent.popitem(last=False)
                self._graph.release(oldest)  # values that share a file's memory count as no bytes, and would stay
        return bound

    @contextmanager
    def using(self, loaded: LoadedPatch | None) -> Iterator[None]:
        """Within the context, `loaded` cannot be unloaded.

        Raises:
            PatchTargetError: the patch was unloaded before.
        """
        if loaded is None:
            yield
            return
        use = Use(loaded.uses)
        try:
            try:
                self.begin(use, loaded)
                yield
            finally:
                use.end()
        finally:
            use.end()  # an interrupt may arrive at the first one

    def begin(self, use: Use, loaded: LoadedPatch) -> None:
        """Begin a use of a loaded patch, which cannot be unloaded until the caller ends the use.

        Args:
            use: a use of the patch (`Use(loaded.uses)`).
            loaded: the loaded patch.

        Raises:
            PatchTargetError: the patch was unloaded before.
        """
        with self.lock:
            if self.by_name(loaded.name) is not loaded:
                raise PatchTargetError(
                    "the patch was unloaded before it was used, and another patch now has its name",
                    field="patch",
                    got=shown(loaded.name),
                    fix="start the request again",
                )
            use.begin()


def _require_live(patch: Patch, result: ProbeCheck) -> None:
    if not result.ok:
        raise PatchFormatError(
            f"the patch {patch.name!r} does not reproduce its probe on this device",
            field="config.probe",
            got=f"max logit error {result.max_logit_error:.3g}, {'live' if result.live else 'not live'}",
            wanted="the logits of the host",
            fix="export the patch again with this version, or check the device",
        )
