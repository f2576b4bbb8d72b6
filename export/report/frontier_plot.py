"""The plot of the prompt's effect against what it costs. This module draws points and measures none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .figures import BOTH, ENTRIES, EXACT, SERIES, SHORTER, THIS, WEIGHTS, Point
from .plots import BASE, ERROR, PATCH, PROMPT, drawn, number

_COLOURS = {
    WEIGHTS: PATCH,
    ENTRIES: PROMPT,
    BOTH: "#7b4fa3",
    EXACT: "#2b8a3e",
    SHORTER: BASE,
    THIS: "#212529",
}
_FIGURES = (("gap closed", "gap_closed"), ("first-token gap", "gap_closed_first"), ("answers kept", "kept"))
_LOWEST = -0.1
# How the markers of a dtype are drawn, and its name in the legend; those of every other dtype are filled.
_FACES: dict[str, tuple[dict[str, str], str]] = {
    "i8": ({"markerfacecolor": "white"}, "int8"),
    "i4": ({"fillstyle": "bottom", "markerfacecoloralt": "white"}, "4 bits"),
}


def frontier(points: Sequence[Point]) -> str:
    """Draw each figure against the bytes of the file, and against the tokens of context in every session.

    The rows are the gap closed, the gap closed at the first token and the share of right answers kept; a row without
    any figure is left out. Points of int8 files are hollow, and those of files of four bits half filled. Points below
    the plot are not drawn.
    """
    rows = [(name, key) for name, key in _FIGURES if any(getattr(p.held_out, key) is not None for p in points)]
    with drawn("frontier", (7.6, 2.5 * len(rows) + 0.5)) as (figure, svg):
        grid = figure.subplots(len(rows), 2, sharex="col", sharey="row", squeeze=False)
        for (name, key), (by_bytes, by_tokens) in zip(rows, grid, strict=True):
            lowest = min(number(getattr(point.held_out, key), 1.0) for point in points)
            by_bytes.set(ylabel=name, xscale="log", ylim=(max(lowest - 0.1, _LOWEST), 1.06))
            for series in SERIES:
                chosen = [point for point in points if point.series == series]
                _draw(by_bytes, [(p.bytes / 1e6, p) for p in chosen if p.bytes is not None], key)
                _draw(by_tokens, [(p.context_tokens, p) for p in chosen], key, named=series == SHORTER)
        grid[-1, 0].set(xlabel="MB on disk")
        grid[-1, 0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        grid[-1, 0].xaxis.set_major_formatter(FuncFormatter(lambda megabytes, _: f"{megabytes:g}"))
        grid[-1, 0].xaxis.set_minor_locator(NullLocator())
        fewest = min(point.context_tokens for point in points)  # below zero if a default system text falls away
        grid[-1, 1].set(xlabel="tokens of context in each session", xlim=(min(fewest, 0) - 2, None))
        present = [series for series in SERIES if any(point.series == series for point in points)]
        handles = [grid[0, 0].plot([], [], color=_COLOURS[series], marker="o", label=series)[0] for series in present]
        for dtype, (face, name) in _FACES.items():
            if any(point.dtype == dtype for point in points):
                style: dict[str, Any] = {"color": BASE, "marker": "o", "linestyle": "", **face}
                handles += grid[0, 0].plot([], [], label=name, **style)
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=7.5, columnspacing=1.2)
    return svg[0]


def _draw(axes: Axes, placed: Sequence[tuple[float, Point]], key: str, named: bool = True) -> None:
    """Draw the points of one series, with a line for each dtype; labels stand beside the points if `named`."""
    for dtype in sorted({point.dtype for _, point in placed}):
        chosen = sorted(((x, p) for x, p in placed if p.dtype == dtype), key=lambda pair: pair[0])
        shares = [number(getattr(point.held_out, key)) for _, point in chosen]
        errors = [number(getattr(point.held_out, f"{key}_se"), 0.0) for _, point in chosen]
        colour = _COLOURS[chosen[0][1].series]
        face, _ = _FACES.get(dtype, ({}, ""))
        marker = "D" if chosen[0][1].series == THIS else "o"
        axes.errorbar(
            [x for x, _ in chosen],
            shares,
            yerr=errors,
            color=colour,
            **{"marker": marker, "markersize": 4.5, "linewidth": 1, **face, **ERROR},
        )
        for (x, point), share in zip(chosen, shares, strict=True):
            if named and dtype not in _FACES and point.series != THIS and share > _LOWEST:
                short = point.label.partition(" of ")[0]
                axes.annotate(short, (x, share), xytext=(5, -9), textcoords="offset points", fontsize=7, color=colour)
