"""The budget: how many entries each layer gets.

A few-shot task lives in the few layers that see everything: they need most of their entries, while the many windowed
layers compress ten times (docs/fidelity.md has the figures). So where a model has both kinds, a windowed layer gets
half of the average, and a full layer what that leaves, up to the whole context. The rest goes to the windowed ones.
"""

from __future__ import annotations

from collections.abc import Sequence

_LEAST_WINDOWED = 32  # below this, windowed layers lose the task


def split_budget(average: int, windows: Sequence[int | None], context: int) -> tuple[int, ...]:
    """Return the number of entries of each layer.

    Args:
        average: the number of entries of a layer on average, at least 1.
        windows: the window of each layer; None for a layer that sees everything.
        context: the number of entries that the context has.

    Returns:
        The counts. Their sum is at most `average` times the number of layers, except that every layer has at least 1.
    """
    most = [context if window is None else min(context, window - 1) for window in windows]
    windowed = [layer for layer, window in enumerate(windows) if window is not None]
    full = len(windows) - len(windowed)
    if not windowed or not full:
        return tuple(min(average, limit) for limit in most)
    total = average * len(windows)
    low = min(max(average // 2, min(_LEAST_WINDOWED, average)), min(most))
    high = min((total - low * len(windowed)) // full, context)
    low = max(1, min((total - high * full) // len(windowed), min(most[layer] for layer in windowed)))
    return tuple(high if window is None else low for window in windows)
