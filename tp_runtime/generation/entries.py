"""A prompt's own keys and values as the entries of a patch: all of them, so text behind them sees the whole prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..patch import KV_PARTS, KVPrefix
from ..session import BoundPatch, Graph, past_name

STEP = 256  # tokens of one run; a run cannot be interrupted, and between runs progress is shown


def prompt_entries(
    graph: Graph,
    prompt: Sequence[int],
    replaces: Sequence[int],
    bound: BoundPatch,
    progress: Callable[[int, int], object] | None = None,
    before_system: bool = False,
) -> KVPrefix:
    """Run a prompt once and return its keys and values.

    A layer of a graph with full and windowed layers keeps what its window ever shows: the first token of a text sees
    window - 1 places in front of it. Without such a length of its own a layer keeps every entry.

    Args:
        graph: the graph that runs the prompt.
        prompt: the ids of the beginning of every prompt with the context, at least one.
        replaces: the ids that stand in its place in a prompt without the context.
        bound: the patch under which the keys and values are computed; it has no entries of its own.
        progress: a function that is called after every run with the number of tokens that have run, and that of all.
        before_system: whether they stand in front of a system message of the prompt's own.

    Raises:
        RequestError: an id is outside the vocabulary, or the context window cannot hold the prompt.
    """
    cache = graph.new_cache(bound)
    for start in range(0, len(prompt), STEP):
        graph.forward(list(prompt[start : start + STEP]), cache, bound)
        if progress is not None:
            progress(len(cache), len(prompt))
    content, windowed = graph.content(cache), graph.folder.windowed  # windowed layers may have dropped what is cut here
    entries = {}
    for layer in range(graph.folder.layers):
        for part in KV_PARTS:  # [heads, filled, head dim] -> [entries, heads, head dim]
            held, first = content[past_name(layer, part)], 0
            if windowed is not None and layer in windowed.layers:
                first = max(0, held.shape[1] - windowed.window + 1)
            entries[layer, part] = held[:, first:].transpose(1, 0, 2)
    return KVPrefix(entries, tuple(replaces), len(prompt), before_system)
