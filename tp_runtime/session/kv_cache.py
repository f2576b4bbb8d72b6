"""The KV cache of one sequence, which belongs to one session and one patch, and to one request at a time.

A patch changes the keys and values of every later layer, so a cache made under one patch is wrong under another. Each
cache stores the key it was made under, and the graph refuses to run it under any other key. Its buffers belong to the
session that made it, so every other session refuses it, also one over the same folder. And two requests that ran in one
cache would write over each other, so a request takes the cache while it runs, and any other gets an error at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NoReturn

from numpy.typing import NDArray

from ..errors import BusyError, RequestError, StaleCacheError, shown
from ..patch import KVPrefix
from .device_step import DeviceStep
from .layer_kinds import NO_ENTRIES, Lengths
from .step_io import StepIO
from .uses import Use, Uses

# The graph digest and the ordered terms (patch identity, strength); the base has no terms.
CacheKey = tuple[str, tuple[tuple[str, float], ...]]

ALWAYS = range(sys.maxsize)  # the value of `shown` if the buffers of windowed layers are bound as a whole
_NOTHING_HELD = sys.maxsize  # the value of `dropped` while the buffers are replaced


_numbers = count(1)  # of the sessions of this process, so that an error can tell two over one folder apart


@dataclass(frozen=True, eq=False)
class SessionMark:
    """The mark that a session puts on its caches. Two sessions never have the same mark, also over one folder.

    Attributes:
        name: the session for people.
    """

    name: str


def new_mark(folder: str) -> SessionMark:
    """Return the mark of one more session; `folder` is the name of its model folder."""
    return SessionMark(f"session {next(_numbers)} over {folder}")


@dataclass(eq=False)
class KVCache:
    """The keys and values of the tokens run so far. One request at a time may use a cache; see `take`.

    A cache cannot be copied, because the copy would write into the same buffers.

    Attributes:
        key: the graph and the patch that the cache was made under.
        prefix: the entries that the patch puts at the front, which stand in for the first ids of every prompt.
        entries: the number of entries of `prefix` in the layers of each kind.
        windowed: the graph inputs of windowed layers; empty if the graph has one cache length for all layers.
        window: the number of places that windowed layers attend to; 0 if there are none.
        dropped: the number of positions at the front of windowed layers that the cache does not hold any more. It is
            larger than the number of all positions while the buffers are replaced, so that an interrupt leaves a cache
            that is computed again.
        tokens: the ids that the cache holds, in order, including those that `prefix` stands in for.
        capacity: the number of positions of full layers up to which the buffers of all layers have room.
        buffers: the buffers [1, kv heads, length, head dim] on the device, by graph input name; kv_buffers.py
            describes how they grow. If `capacity` is 0, they are a copy on the host, [1, kv heads, filled, head dim],
            which the next run copies to the device.
        binding: the ONNX Runtime binding of the last run; it is reused from step to step.
        values: the OrtValues of the patch that are bound, by graph input name; the binding does not keep them alive.
        shown: the numbers of filled positions from which a run may continue with the part of the buffers of windowed
            layers that is bound now (kv_buffers.py).
        bound_lengths: the lengths of windowed layers that are bound, by graph input name, which must stay alive.
        made_by: the binding whose outputs the buffers are, in a graph that concatenates.
        spare: a binding that neither `binding` nor `made_by` needs.
        start: the first contents of the buffers, [kv heads, filled, head dim], by graph input name; they are read and
            never written.
        step: the ids and logits that are bound to `binding` since the last decode step; None after any other run. On a
            device the values are a DeviceStep, which stays.
        session: the session that made the cache; None if a batch has taken over its contents.
        batched: whether the cache belongs to a row of a batch, whose steps are not captured (cuda_graphs.py).
        uses: the requests that use the cache. The first one holds it, and any other is about to be refused.
    """

    key: CacheKey
    prefix: KVPrefix | None = None
    entries: Lengths = NO_ENTRIES
    windowed: Set[str] = frozenset()
    window: int = 0
    dropped: int = field(default=0, init=False)
    capacity: int = 0
    tokens: list[int] = field(default_factory=list)
    buffers: dict[str, Any] = field(default_factory=dict)
    binding: Any = None
    values: Mapping[str, Any] | None = None
    made_by: Any = None
    spare: Any = None
    shown: range = field(default=ALWAYS, init=False, repr=False)
    bound_lengths: Mapping[str, Any] = field(default_factory=dict, init=False, repr=False)
    start: Mapping[str, NDArray[Any]] | None = None
    step: StepIO | DeviceStep | None = None
    batched: bool = field(default=False, init=False)
    session: SessionMark | None = field(default=None, init=False)
    uses: Uses = field(default_factory=Uses, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.prefix is not None and not self.tokens:
            self.tokens.extend(self.prefix.replaces)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def filled(self) -> int:
        """The number of filled positions of full layers.

        A prefix counts by its own entries, not by the ids that it replaces.
        """
        if self.prefix is None:
            return len(self.tokens)
        return self.entries.full + len(self.tokens) - len(self.prefix.replaces)

    @property
    def shift(self) -> int:
        """The number of positions by which windowed layers hold more than full ones; negative if they hold fewer."""
        return self.entries.windowed - self.entries.full - self.dropped

    @property
    def lengths(self) -> Lengths:
        """The number of filled positions of the layers of each kind."""
        filled = self.filled
        return Lengths(filled, filled + self.shift)

    @property
    def reaches(self) -> bool:
        """Whether windowed layers hold all that the window shows the next id.

        A cache that dropped positions and was then rewound may lack some of them.
        """
        return not self.dropped or self.lengths.windowed >= self.window - 1

    @property
    def skipped(self) -> int:
        """The difference between the next id's position and the number of ids before it."""
        return 0 if self.prefix is None else self.prefix.skipped

    def require_start(self, tokens: Sequence[int]) -> None:
        """Raise RequestError unless a prompt of `tokens` can follow the prefix."""
        if self.prefix is not None:
            self.prefix.require_start(tokens if type(tokens) is list else token_list(tokens))

    def require_key(self, key: CacheKey) -> None:
        """Raise StaleCacheError unless the cache was made under `key`."""
        if type(key) is not tuple or self.key != key:
            raise StaleCacheError(
                "the KV cache was made under another patch",
                field="cache",
                got=_describe(self.key),
                wanted=_describe(key),
                fix="start a new cache after a switch",
            )

    def require_session(self, session: SessionMark) -> None:
        """Raise StaleCacheError unless the cache was made by `session` and still has its contents."""
        if self.session is not session:
            raise StaleCacheError(
                "the KV cache was made by another open model, or a batch took over its contents",
                field="cache",
                got="a cache of no session" if self.session is None else f"a cache of {self.session.name}",
                wanted=f"a cache of {session.name}",
                fix="use a cache only with the open model whose new_cache made it",
            )

    def hand_over(self) -> None:
        """Give up the contents, which a batch has taken over. From then on every session refuses the cache."""
        self.session = None
        self.buffers, self.binding, self.capacity, self.start, self.step = {}, None, 0, None, None
        self.made_by, self.spare, self.values = None, None, None

    def begin_with(self, start: Mapping[str, NDArray[Any]], dropped: int, tokens: Sequence[int]) -> None:
        """Give a cache in which nothing was run its first contents.

        Args:
            start: the contents [kv heads, filled, head dim], by graph input name, which are never written.
            dropped: the number of positions that those of windowed layers lack.
            tokens: the ids.
        """
        self.dropped = _NOTHING_HELD
        self.start = start
        self.tokens[:] = tokens
        self.dropped = dropped

    def adopt(self, other: KVCache) -> None:
        """Take over the contents of another cache of the same session, patch and tokens, which is not used any more."""
        self.dropped = _NOTHING_HELD
        self.start = None
        self.step = other.step if isinstance(other.step, DeviceStep) else None  # the binding has its addresses
        self.values, self.made_by, self.spare = other.values, other.made_by, other.spare
        self.buffers, self.binding, self.bound_lengths = other.buffers, other.binding, other.bound_lengths
        self.capacity, self.shown = other.capacity, other.shown
        self.dropped = other.dropped

    def replace_buffers(self, buffers: dict[str, Any], binding: Any, dropped: int) -> None:
        """Put other buffers in place, in which windowed layers lack `dropped` positions; `capacity` is 0 then.

        An interrupt between two lines leaves buffers of capacity 0, which the next run copies. If other positions are
        dropped than before, it leaves a cache that is computed again.
        """
        self.capacity = 0
        if dropped != self.dropped:
            self.dropped = _NOTHING_HELD
        self.buffers, self.binding = buffers, binding
        self.dropped = dropped

    # -- one request at a time -------------------------------------------------------------------------------

    def take(self, use: Use) -> None:
        """Take the cache for a request, by beginning its use. Nobody else can use the cache until the use ends.

        Args:
            use: a use of the cache (`Use(cache.uses)`), which the caller ends also if this raises.

        Raises:
            BusyError: another request holds the cache.
        """
        self.require_free()
        use.begin()
        if self.uses.first() is not use:  # another thread was faster
            use.end()
            raise _busy()

    def require_free(self, held: Use | None = None) -> None:
        """Raise BusyError if a request other than that of `held` holds the cache."""
        if held is None:
            if self.uses.first() is not None:
                raise _busy()
        elif held not in self.uses:
            raise _busy()

    def __copy__(self) -> NoReturn:
        raise RequestError(
            "a KV cache cannot be copied or pickled",
            field="cache",
            got=f"a cache of {len(self)} tokens",
            fix="make another with new_cache; a model with a prefix cache does not run a shared beginning again",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.__copy__()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self.__copy__()

    # -- the tokens ------------------------------------------------------------------------------------------

    def keep_prefix(self, tokens: Sequence[int], held: Use | None = None) -> int:
        """Drop all tokens after the longest common prefix with `tokens`; returns the length of that common prefix.

        The common prefix never includes the last of `tokens`, because the logits of that token are needed to continue.

        Args:
            tokens: at least one id.
            held: the caller's use of the cache, if it holds the cache.

        Raises:
            RequestError: `tokens` is empty or not a sequence, or cannot follow the patch's KV prefix.
            BusyError: another request holds the cache.
        """
        if type(tokens) is not list:
            tokens = token_list(tokens)
        if not tokens:
            raise RequestError("the list of tokens is empty", field="tokens", got=0, wanted="at least one id")
        self.require_start(tokens)
        if held not in self.uses:
            self.require_free(held)
        common = min(len(self.tokens), len(tokens) - 1)
        if self.tokens[:common] != tokens[:common]:  # in a decode step nothing differs, and one comparison in C is fast
            pairs = zip(self.tokens, tokens, strict=False)
            common = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
        del self.tokens[common:]
        return common


def require_cache(cache: object) -> None:
    """Raise RequestError unless the value is a KV cache."""
    if not isinstance(cache, KVCache):
        raise RequestError(
            "the value is not a KV cache", field="cache", got=type(cache).__name__, wanted="a cache from new_cache"
        )


def token_list(tokens: Any) -> list[int]:
    """Return token ids as a list. This does not check the ids themselves.

    Raises:
        RequestError: `tokens` is not a sequence of ids: a single id, text, a mapping, or nothing.
    """
    if isinstance(tokens, str | bytes | bytearray | Mapping | Set) or not isinstance(tokens, Iterable):
        raise RequestError(
            "the value is not a list of token ids",
            field="tokens",
            got=type(tokens).__name__,
            wanted="a list of whole numbers",
        )
    return list(tokens)


def _busy() -> BusyError:
    return BusyError(
        "another request is using the KV cache",
        field="cache",
        got="a cache of a request that runs, or of a stream that has begun and has not ended",
        wanted="a cache that no other request uses",
        fix="read or close the other stream first, or use one cache for each conversation",
    )


def _describe(key: CacheKey) -> str:
    try:
        graph, terms = key
        patches = ", ".join(f"{identity[:12]}@{strength:g}" for identity, strength in terms)
        return f"graph {graph[:12]}, {patches or 'no patch'}"
    except (TypeError, ValueError):  # the caller passed something else than a key
        return shown(key)
