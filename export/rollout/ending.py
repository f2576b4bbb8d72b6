"""Where a completion ends: at an end-of-sequence token, or where its text holds a stop string.

Calibration has to end where use ends. If the teacher ran on after the answer, the patch would be fitted to what the
model goes on to invent, and the answer itself would count for less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tp_runtime.text import TextCodec


@dataclass(frozen=True)
class Ending:
    """What ends a completion.

    Attributes:
        eos_ids: the ids that end a completion.
        stop: the texts that end a completion; the token that completes one of them is the completion's last.
        decode: the function that turns ids into text.
    """

    eos_ids: frozenset[int]
    stop: tuple[str, ...] = ()
    decode: Callable[[Sequence[int]], str] = lambda ids: ""

    @classmethod
    def of(cls, codec: TextCodec, stop: Sequence[str] = ()) -> Ending:
        """Return the ending of a model's completions."""
        return cls(codec.eos_ids, tuple(stop), codec.decode)

    def reached(self, ids: Sequence[int]) -> bool:
        """Return whether a completion that has not ended before its last id ends with it."""
        if not ids:
            return False
        return ids[-1] in self.eos_ids or (bool(self.stop) and self.stopped(ids))

    def stopped(self, ids: Sequence[int]) -> bool:
        """Return whether the text of a completion holds a stop string."""
        text = self.decode(ids)
        return any(stop in text for stop in self.stop)

    def cut(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Return a completion up to the id that ends it, that id included."""
        ends = range(1, len(ids) + 1)
        ids = ids[: next((end for end in ends if ids[end - 1] in self.eos_ids), len(ids))]
        if self.stop and self.stopped(ids):
            ids = ids[: next(end for end in ends if self.stopped(ids[:end]))]
        return tuple(ids)
