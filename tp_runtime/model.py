"""The face of the runtime: a model folder, its loaded patches, text in and text out."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import engine, probe
from .cache import KVCache
from .detokenize import StopScanner
from .errors import PatchFormatError, PatchInUseError, PatchTargetError, RequestError
from .folder import ModelFolder
from .graph import BoundPatch, Graph
from .patch import Patch
from .sampling import Sampling
from .stream import TextStream
from .text import Message, TextCodec

log = logging.getLogger("tp_runtime")
_KEPT_BINDINGS = 8  # of expressions such as 0.5 * p, which are bound on first use


class _Active:
    """Stands for "the patch that is active here" where None means no patch."""

    def __repr__(self) -> str:
        return "ACTIVE"


ACTIVE: Final = _Active()
PatchChoice = Patch | str | None | _Active


@dataclass(eq=False)
class _Loaded:
    """A patch that was given a name, and how many requests and `patched` blocks use it right now."""

    name: str
    patch: Patch
    bound: BoundPatch
    users: int = 0


@dataclass(frozen=True)
class _Choice:
    """What a request runs under: the loaded patch it came from, if any, the patch, if known, and what is bound."""

    loaded: _Loaded | None
    patch: Patch | None
    bound: BoundPatch


class PatchedModel:
    """A base model in a live session, and the patches loaded beside it.

    Requests may run in several threads at once, each under its own patch. `with model.patched(p):` holds for the
    thread or task that enters it.

    Args:
        graph: the session.
        codec: the tokenizer and chat template.
        default: what requests run under that name no patch; by default what the graph computes with nothing bound.
    """

    def __init__(self, graph: Graph, codec: TextCodec, default: BoundPatch | None = None) -> None:
        self.graph, self.codec = graph, codec
        self._default = default or graph.default
        self._loaded: dict[str, _Loaded] = {}
        self._recent: OrderedDict[tuple[Any, ...], BoundPatch] = OrderedDict()
        # Reentrant: a stream that was dropped is released by the garbage collector, in whichever line that runs.
        self._lock = threading.RLock()
        self._active: ContextVar[_Choice | None] = ContextVar("patch", default=None)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str = "auto",
        *,
        patch: Patch | str | Path | _Active | None = ACTIVE,
        threads: int | None = None,
        verify: bool = False,
    ) -> PatchedModel:
        """Open an exported folder.

        Args:
            path: the folder.
            device: `cuda`, `cpu`, or `auto`: CUDA if it is there, else the CPU with the reason logged.
            patch: baked in at load time as what requests without a patch of their own get: a patch or its file; None
                for the base model. By default what the folder was exported with.
            threads: threads of one operator; None takes the cores there are.
            verify: check the digest of every file, the weights too.

        Raises:
            ModelFormatError, UnsafePathError: the folder is not what was exported.
            DeviceUnavailableError: `cuda` was asked for and not given, or there is no ONNX Runtime.
            PatchError: the patch is damaged or does not fit.
        """
        folder = ModelFolder.open(path, verify)
        codec = TextCodec.from_folder(folder.path, "chat" if folder.style == "chat" else "completion")
        if isinstance(patch, str | Path):
            patch = Patch.load(patch)
        if not isinstance(patch, Patch | _Active | None):
            raise _not_a_patch(patch, "a Patch, its file, or None")
        graph = Graph(folder, device, threads, patch if isinstance(patch, Patch) else None)
        if graph.device.requested == "auto" and graph.device.reason:
            log.warning("running on the CPU: %s", graph.device.reason)
        return cls(graph, codec, graph.base if patch is None else graph.default)

    # -- patches ---------------------------------------------------------------------------------------------

    @property
    def patches(self) -> Mapping[str, Patch]:
        """The loaded patches by name."""
        with self._lock:
            return MappingProxyType({name: loaded.patch for name, loaded in self._loaded.items()})

    def load_patch(self, patch: str | Path | Patch, name: str | None = None, *, check: bool = False) -> str:
        """Load a patch beside the model, ready to be switched on by name.

        Args:
            patch: a patch file, or a patch.
            name: what to call it; by default the name it carries.
            check: also run its probe, so that it is known to do here what it did on the host.

        Returns:
            The name.

        Raises:
            PatchInUseError: the name is taken.
            PatchError: the file is damaged, or the patch does not fit this model; or, with `check`, it has no probe or
                does not reproduce it. The loaded patches are as before.
        """
        if not isinstance(patch, Patch):
            patch = Patch.load(patch)
        name = patch.name if name is None else name
        bound = self.graph.bind(patch)
        if check:
            self._require_live(patch)
        with self._lock:
            if name in self._loaded:
                raise PatchInUseError(
                    "the name is taken",
                    field="name",
                    got=repr(name),
                    wanted=f"none of {sorted(self._loaded)}",
                    fix="unload_patch it first, or load_patch(..., name='another')",
                )
            self._loaded[name] = _Loaded(name, patch, bound)
        return name

    def unload_patch(self, name: str) -> None:
        """Forget a loaded patch; requests without one give the base model's output, bit for bit.

        Raises:
            PatchTargetError: no patch of that name is loaded.
            PatchInUseError: a request or a `patched` block is using it.
        """
        with self._lock:
            users = self._by_name(name).users
            if users:
                raise PatchInUseError(
                    "the patch is in use",
                    field="name",
                    got=f"{name!r}, used {users} times right now",
                    fix="finish or close the streams and leave the `with model.patched(...)` blocks that use it",
                )
            del self._loaded[name]

    @contextmanager
    def patched(self, patch: Patch | str | None, strength: float = 1.0) -> Iterator[PatchedModel]:
        """Within the context, requests of this thread or task run under `patch` unless they name another.

        Raises:
            PatchError: the patch is not loaded or does not fit; nothing is changed then.
        """
        choice = self._resolve(patch, strength)
        with self._using(choice.loaded):
            token = self._active.set(choice)
            try:
                yield self
            finally:
                self._active.reset(token)

    def check(self, patch: Patch | str) -> probe.Check:
        """Run a patch's probe: is it live on this device, and does it do what it did on the host?

        Raises:
            PatchFormatError: it carries no probe.
            PatchError: it is not loaded or does not fit.
        """
        return probe.check(self.graph, self._by_name(patch).patch if isinstance(patch, str) else patch)

    def _require_live(self, patch: Patch) -> None:
        result = probe.check(self.graph, patch)
        if not result.ok:
            raise PatchFormatError(
                f"the patch {patch.name!r} does not do here what it did on the host",
                field="config.probe",
                got=f"max logit error {result.max_logit_error:.3g}, {'live' if result.live else 'not live'}",
                wanted="the host's logits",
                fix="export the patch again with this version, or check the device",
            )

    def _by_name(self, name: str) -> _Loaded:
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

    def _resolve(self, patch: PatchChoice, strength: float) -> _Choice:
        """What a request runs under; the strength applies to whatever that is."""
        if isinstance(patch, _Active):
            choice = self._active.get() or _Choice(None, None, self._default)
        elif isinstance(patch, str):
            loaded = self._by_name(patch)
            choice = _Choice(loaded, loaded.patch, loaded.bound)
        elif isinstance(patch, Patch):
            scaled = strength * patch
            return _Choice(None, scaled, self._bind(scaled))
        elif patch is None:
            choice = _Choice(None, None, self.graph.base)
        else:
            raise _not_a_patch(patch, "a name, a Patch, or None")
        if strength == 1.0:
            return choice
        if choice.patch is None:
            raise PatchTargetError(
                "a strength, and no patch it could scale",
                field="strength",
                got=strength,
                wanted="1.0, or a patch",
                fix="pass patch=",
            )
        scaled = strength * choice.patch
        return _Choice(choice.loaded, scaled, self._bind(scaled))

    def _bind(self, patch: Patch) -> BoundPatch:
        """Bind an expression, or find it bound: the last few are kept."""
        # The terms say what is bound; whether it may be bound here is the base's matter, which they leave out.
        key = (patch.terms, patch.config.base_digest, patch.config.precision)
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
                return self._recent[key]
        bound = self.graph.bind(patch)
        with self._lock:
            self._recent[key] = bound
            while len(self._recent) > _KEPT_BINDINGS:
                self._recent.popitem(last=False)
        return bound

    @contextmanager
    def _using(self, loaded: _Loaded | None) -> Iterator[None]:
        """Within the context `loaded` cannot be unloaded; PatchTargetError if it already was."""
        if loaded is None:
            yield
            return
        with self._lock:
            if self._by_name(loaded.name) is not loaded:
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
            with self._lock:
                loaded.users -= 1

    # -- requests --------------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        system: str | None = None,
        raw: bool = False,
        patch: PatchChoice = ACTIVE,
        strength: float = 1.0,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        cache: KVCache | None = None,
    ) -> TextStream:
        """Start a completion; iterate over the result for its text.

        Args:
            prompt: a string is one user message through the chat template (for a completion-style model: the text to
                continue); or a list of {"role", "content"} messages.
            system: a system message in front (completion style: context text).
            raw: take a string as it is, without the chat template.
            patch: a loaded patch's name, a Patch, an expression such as `0.5 * p + q`, or None for the base model. By
                default what `patched` set, else what the model was opened with.
            strength: scales the patch; negative turns it round.
            max_new_tokens: at most this many tokens.
            temperature, top_k, top_p, min_p, repetition_penalty, seed: see sampling.Sampling; 0.0 is greedy.
            stop: strings that end the completion and are not part of it.
            cache: from `new_cache`, to go on from earlier text of the same conversation.

        Raises:
            RequestError: a prompt or a value that cannot be served.
            PatchError: the patch is not loaded or does not fit.
            StaleCacheError: `cache` was made under another patch.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        scanner = StopScanner(stop)
        choice = self._resolve(patch, strength)
        if choice.bound.prefix is not None:
            _refuse_system(prompt, system)
        tokens = self.codec.render(prompt, system, raw=raw)
        ids = engine.generate(
            self.graph,
            tokens,
            choice.bound,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            eos_ids=self.codec.eos_ids,
            cache=cache,
        )
        return TextStream(ids, self.codec, scanner, len(tokens), self._using(choice.loaded))

    def generate(self, prompt: str | Sequence[Message], **options: Any) -> str:
        """The whole text of a completion. Arguments and errors are those of `stream`."""
        return "".join(self.stream(prompt, **options))

    def new_cache(self, patch: PatchChoice = ACTIVE, strength: float = 1.0) -> KVCache:
        """An empty KV cache for a conversation under a patch; it serves no other (contract: StaleCacheError)."""
        return self.graph.new_cache(self._resolve(patch, strength).bound)

    def logits(
        self, token_ids: Sequence[int], patch: PatchChoice = ACTIVE, strength: float = 1.0
    ) -> NDArray[np.float32]:
        """Logits [T, vocab] of T token ids, float32; under a patch with a KV prefix, of those it does not replace.

        Raises:
            RequestError: no ids, ids outside the vocabulary, more than the context window, or a start that the
                patch's KV prefix cannot stand in for.
            PatchError: the patch is not loaded or does not fit.
        """
        choice = self._resolve(patch, strength)
        with self._using(choice.loaded):
            return self.graph.run(list(token_ids), choice.bound)


def _refuse_system(prompt: str | Sequence[Message], system: str | None) -> None:
    """A KV prefix holds the place of the system message; the ids alone show one only where templates have a default."""
    first = prompt[0] if not isinstance(prompt, str) and prompt else {}
    if system is not None or (isinstance(first, Mapping) and first.get("role") == "system"):
        raise RequestError(
            "the patch's KV prefix stands where a system message would",
            field="system",
            got=repr(str(system if system is not None else first.get("content"))[:40]),
            wanted="user messages without a system prompt",
            fix="leave it out, or use a patch without a KV prefix",
        )


def _not_a_patch(got: object, wanted: str) -> PatchTargetError:
    return PatchTargetError("not a patch", field="patch", got=type(got).__name__, wanted=wanted)
