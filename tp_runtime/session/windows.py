"""How many positions windowed layers keep, and how many ids one run takes, in a graph that has such layers.

A windowed layer attends to its last places only (layer_kinds.py). Two things follow, and neither changes what a graph
computes:

- The operator is shown the end of such a layer's buffer only. It would compute the scores of every position that it is
  shown, and discard those outside the window. A long prompt runs in parts for the same reason: what a part is shown of
  a windowed layer is the window and the part itself.
- With the setting `window_cache`, the positions that no later id attends to are dropped, so that these layers need a
  fixed number of bytes, however long the text is. Everything that goes back to an earlier id then needs what was
  dropped: the cache is computed again from its ids (Graph.forward).

Both follow from the lengths that are bound with `tp.windowed_shift` and `tp.windowed_total`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .model_folder import ModelFolder

LONGEST_RUN = 256  # ids of one run; prompts of Gemma 3 270M run fastest in parts of 256 to 512
SLIDE = 64  # positions; showing the operator another part of the buffers costs as much as attending to a few more


@dataclass(frozen=True)
class WindowPlan:
    """What the windowed layers of one graph keep.

    Attributes:
        window: the number of places that these layers attend to, the token itself included.
        bounded: whether to drop what no later id attends to.
    """

    window: int
    bounded: bool

    @property
    def limit(self) -> int | None:
        """The largest number of positions of a buffer: two windows; None if nothing is dropped."""
        return 2 * self.window if self.bounded else None

    @property
    def longest_run(self) -> int:
        """The largest number of ids of one run."""
        return min(LONGEST_RUN, self.window + 1) if self.bounded else LONGEST_RUN

    def surplus(self, held: int, more: int) -> int:
        """Return how many positions to drop, of `held` ones, before a run of `more` ids.

        Half a window more than the next id needs is kept, if there is room for it, so that a cache can go back a
        little.
        """
        if self.limit is None or held + more <= self.limit:
            return 0
        return max(0, held - max(self.hidden, min(self.hidden + self.window // 2, self.limit - more)))

    @property
    def hidden(self) -> int:
        """The number of places in front of an id that the window shows it."""
        return self.window - 1

    def first_shown(self, held: int) -> int:
        """Return the first of `held` positions that the next id needs."""
        return max(0, held - self.hidden)


def kv_bytes(folder: ModelFolder, tokens: int, window_cache: bool = False) -> int:
    """Return the bytes of the keys and values of one text.

    Args:
        folder: the model folder.
        tokens: the length of the text.
        window_cache: whether windowed layers drop what no later id attends to.
    """
    windowed = folder.windowed
    limit = None if windowed is None else WindowPlan(windowed.window, window_cache).limit
    bounded = 0 if windowed is None or limit is None else len(windowed.layers)
    positions = (folder.layers - bounded) * tokens + bounded * min(tokens, limit or tokens)
    return 2 * positions * folder.kv.heads * folder.kv.head_dim * folder.kv.numpy_dtype.itemsize
