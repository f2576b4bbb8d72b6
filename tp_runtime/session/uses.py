"""The uses of one thing by requests and threads: how many go on now, and which of them began first.

A use must end exactly once, also if a Ctrl-C arrives at any line between its beginning and its end. A counter and a
lock cannot give that: an interrupt between taking them and the `try` leaves them taken for ever. So a use is an object
that exists before it begins. It goes on until its `end` is called or until nothing refers to it any more, whichever
comes first. The pattern is

    use = Use(uses)
    try:
        try:
            use.begin()
            ...
        finally:
            use.end()
    finally:
        use.end()  # an interrupt may arrive at the first one

All steps on the shared dictionary are single calls in C, so no lock is needed and nothing ever waits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial


class Use:
    """One use of a thing.

    Args:
        uses: the uses of the thing.

    Attributes:
        begin: begins the use, which goes on until it is ended or dropped.
        end: ends the use; after the end it has no effect. It is one call in C, which a signal handler cannot interrupt.
        mark: a weak reference to the use, which stands for it among the uses.
    """

    __slots__ = ("__weakref__", "begin", "end", "mark")

    def __init__(self, uses: Uses) -> None:
        self.mark = weakref.ref(self)
        self.begin: Callable[[], None] = partial(uses.marks.__setitem__, self.mark, None)
        self.end: Callable[[], None] = partial(uses.marks.pop, self.mark, None)


class Uses:
    """The uses of one thing that go on now. Any number of threads may begin and end uses.

    Attributes:
        marks: the marks of the uses, in the order in which they began; see Use.
    """

    __slots__ = ("marks",)

    def __init__(self) -> None:
        self.marks: dict[weakref.ref[Use], None] = {}

    def __contains__(self, use: object) -> bool:
        """Return whether `use` is a use of this thing and goes on."""
        return type(use) is Use and use.mark in self.marks

    def first(self) -> Use | None:
        """Return the use that began first, of those that go on; None if there is none."""
        for mark in tuple(self.marks):
            use = mark()
            if use is not None:
                return use
            self.marks.pop(mark, None)  # it was dropped without `end`, which happens after an interrupt
        return None

    def __len__(self) -> int:
        """Return the number of uses that go on."""
        return sum(mark() is not None for mark in tuple(self.marks))
