"""The plots of a report as SVG text for an HTML page. This module draws figures and measures none."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..measure import Closeness
from .figures import Baseline, Curve, Layer, Sweep, Turn

BASE, PROMPT, PATCH, PALE = "#868e96", "#1c6ba0", "#c4512d", "#e6b8a8"
# How standard errors are drawn.
ERROR: dict[str, Any] = {"ecolor": "#495057", "elinewidth": 0.8, "capsize": 2, "capthick": 0.8}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#868e96",
    "axes.labelcolor": "#343a40",
    "xtick.color": "#495057",
    "ytick.color": "#495057",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e9ecef",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",  # letters are drawn as shapes, so the page needs no font
}


def positions(curve: Curve) -> str:
    """Draw KL by completion position, unpatched and patched, and the number of tokens in each bin."""
    with drawn("positions", (7.6, 2.7)) as (figure, svg):
        axes: Axes = figure.subplots()
        at = [(i + 0.5) * curve.width - 0.5 for i in range(len(curve.patched))]
        axes.plot(at, curve.unpatched, color=BASE, marker="o", markersize=3, label="no prompt")
        axes.plot(at, curve.patched, color=PATCH, marker="o", markersize=3, label="patch")
        top = 1.3 * max(*curve.unpatched, *curve.patched)  # room for the legend
        axes.set(xlabel="position in the answer", ylabel="KL, nats per token", ylim=(0, top))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _tokens(axes, at, curve)
        axes.legend(loc="upper right", ncols=2)
    return svg[0]


def long_answers(forced: Curve, own: Curve) -> str:
    """Draw by position the KL along the patched model's own text, and the gap closed along each model's text."""
    with drawn("long", (7.6, 2.7)) as (figure, svg):
        left, right = figure.subplots(1, 2)
        at = [(i + 0.5) * own.width - 0.5 for i in range(len(own.patched))]
        left.plot(at, own.unpatched, color=BASE, marker="o", markersize=3, label="no prompt")
        left.plot(at, own.patched, color=PATCH, marker="o", markersize=3, label="patch")
        left.set(xlabel="position in the patch's answer", ylabel="KL, nats per token", ylim=(0, None))
        left.legend(loc="upper right")
        for curve, colour, label in ((forced, PROMPT, "prompt's text"), (own, PATCH, "patch's own text")):
            at = [(i + 0.5) * curve.width - 0.5 for i in range(len(curve.patched))]
            gaps = [1 - p / u if u > 0 else 0.0 for p, u in zip(curve.patched, curve.unpatched, strict=True)]
            right.plot(at, gaps, color=colour, marker="o", markersize=3, label=label)
        right.axhline(0, color=BASE, linewidth=0.8)
        low = right.get_ylim()[0]
        right.set(xlabel="position in the answer", ylabel="gap closed", ylim=(max(min(low, -0.05), -1.5), 1.03))
        right.legend(loc="lower left")
    return svg[0]


def turns(measured: Sequence[Turn]) -> str:
    """Draw the gap closed in each turn, along the prompted model's dialogue and along the patched model's own."""
    with drawn("turns", (3.6, 2.5)) as (figure, svg):
        axes: Axes = figure.subplots()
        at = [turn.turn for turn in measured]
        for shift, close, colour, label in (
            (-0.19, [t.forced for t in measured], PROMPT, "prompt's dialogue"),
            (0.19, [t.own for t in measured], PATCH, "patch's own"),
        ):
            gaps, errors = [number(c.gap_closed) for c in close], [number(c.gap_closed_se) for c in close]
            places = [x + shift for x in at]
            axes.bar(places, gaps, 0.36, yerr=errors, error_kw=ERROR, color=colour, label=label)
        axes.axhline(0, color=BASE, linewidth=0.8)
        axes.set(xlabel="turn", ylabel="gap closed", xticks=at)
        axes.set_ylim(top=1.35)  # room for the legend above the bars
        axes.legend(loc="upper right", ncols=2, fontsize=7.5, columnspacing=1)
    return svg[0]


def layers(measured: Sequence[Layer]) -> str:
    """Draw the share of the effect that is lost when one layer is switched off.

    If the energy that the rank keeps is known, a second plot above shows it.
    """
    sites = sorted({site for layer in measured for site in layer.retained})
    rows = 2 if sites else 1
    with drawn("layers", (7.6, 1.9 * rows + 0.5)) as (figure, svg):
        grid = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        at = [layer.layer for layer in measured]
        if sites:
            for site, colour in zip(sites, (PROMPT, PATCH, BASE), strict=False):
                kept = [layer.retained.get(site, float("nan")) for layer in measured]
                grid[0].plot(at, kept, marker="o", markersize=3, color=colour, label=site)
            grid[0].set(ylabel="energy kept", ylim=(0, 1.05))
            if len(sites) > 1:
                grid[0].legend(loc="lower right", ncols=3)
        grid[-1].bar(at, [layer.share for layer in measured], color=PATCH)
        grid[-1].axhline(0, color=BASE, linewidth=0.8)
        grid[-1].set(xlabel="layer", ylabel="share of the effect")
        grid[-1].xaxis.get_major_locator().set_params(integer=True)
    return svg[0]


def strengths(sweep: Sweep) -> str:
    """Draw KL against strength, and the distinct 3-grams, which are few if the text falls into loops."""
    with drawn("strengths", (7.6, 2.7)) as (figure, svg):
        left, right = figure.subplots(1, 2)
        at = [s.strength for s in sweep.strengths]
        left.plot(at, [s.kl for s in sweep.strengths], color=PATCH, marker="o", markersize=3)
        left.set(xlabel="strength", ylabel="KL to the prompt, nats", ylim=(0, None))
        right.plot(at, [s.distinct for s in sweep.strengths], color=PATCH, marker="o", markersize=3, label="patch")
        right.axhline(sweep.prompted_distinct, color=PROMPT, linewidth=1, linestyle="--", label="prompt")
        right.set(xlabel="strength", ylabel="distinct 3-grams", ylim=(0, 1.05))
        right.legend(loc="lower left")
        for axes in (left, right):
            for mark in (0, 1):
                axes.axvline(mark, color="#ced4da", linewidth=0.8, zorder=0)
    return svg[0]


def methods(measured: Sequence[Baseline], patch: Closeness) -> str:
    """Draw the gap closed by each method.

    The bar of a method whose gap lies below -0.35 stops there, and its label has an arrow.
    """
    known = [(m.method, m.closeness) for m in measured if m.closeness is not None]
    with drawn("methods", (7.6, 0.36 * (len(known) + 1) + 0.7)) as (figure, svg):
        axes: Axes = figure.subplots()
        names = [*(name for name, _ in known), "this patch"]
        close = [*(one for _, one in known), patch]
        gaps, errors = [number(one.gap_closed) for one in close], [number(one.gap_closed_se, 0.0) for one in close]
        colours = [*(BASE if n in ("steering", "isotropic") else PALE for n in names[:-1]), PATCH]
        floor = -0.35
        inside = [error if gap >= floor else 0.0 for gap, error in zip(gaps, errors, strict=True)]
        axes.barh(names, [max(gap, floor) for gap in gaps], xerr=inside, error_kw=ERROR, color=colours, height=0.7)
        for row, (gap, error) in enumerate(zip(gaps, inside, strict=True)):
            text = f"{gap:.3f}" if gap >= floor else f"← {gap:.3g}"
            axes.text(max(gap + error, 0) + 0.01, row, text, va="center", fontsize=8.5)
        axes.axvline(0, color=BASE, linewidth=0.8)
        axes.set(xlabel="share of the prompt's effect, held out", xlim=(min(0, *gaps, 0) and floor, 1.12))
        axes.grid(axis="x")
        axes.grid(axis="y", visible=False)
        axes.invert_yaxis()
    return svg[0]


def _tokens(axes: Axes, at: Sequence[float], curve: Curve) -> None:
    """Draw the number of tokens in each bin as pale bars, since the last bins contain only a few tokens."""
    twin = axes.twinx()
    twin.bar(at, curve.tokens, width=0.9 * curve.width, color="#f1f3f5", zorder=0)
    twin.set_ylabel("tokens", color="#adb5bd")
    twin.tick_params(colors="#adb5bd")
    twin.grid(visible=False)
    twin.set_ylim(0, 3 * max(curve.tokens))
    axes.set_zorder(twin.get_zorder() + 1)
    axes.patch.set_visible(False)


def number(value: float | None, otherwise: float = float("nan")) -> float:
    """Return a figure for a plot; one that does not exist is not drawn."""
    return otherwise if value is None else value


@contextmanager
def drawn(name: str, inches: tuple[float, float]) -> Iterator[tuple[Figure, list[str]]]:
    """Yield a figure and a list; on exit the list receives the figure's SVG, without XML prologue and metadata."""
    svg: list[str] = []
    # With this salt the ids of one plot differ from those of the other plots on the page and are the same in every run.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=inches, layout="constrained")
        yield figure, svg
        text = io.StringIO()
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=empty)
    drawn = text.getvalue()
    svg.append(drawn[drawn.index("<svg") :])
