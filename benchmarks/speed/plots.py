"""Draws the plots of BENCHMARKS.md, one SVG file for each question. This module measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Run = dict[str, Any]

OURS, GENAI, LLAMA, OTHER = "#c4512d", "#1c6ba0", "#2b8a3e", "#868e96"
_COLOURS = {"ours": OURS, "ours_window": OURS, "genai": GENAI, "llama_cpp": LLAMA}
_BITS = {"fp32": "o", "int8": "s", "int4": "^"}
_SHADES = {"fp32": "#c4512d", "int8": "#1c6ba0", "int4": "#2b8a3e"}
# These settings differ from those of the plots inside a report.
_OWN_STYLE: dict[Any, Any] = {
    "axes.grid": False,
    "axes.grid.axis": "both",
    "axes.titlesize": 9,
    "legend.fontsize": 7,
    "svg.fonttype": "none",
    "svg.hashsalt": "tp-runtime",  # the same figures give the same file
}


def draw(found: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Draw every plot that the figures allow, and return each file under the name of its plot."""
    import matplotlib

    from tp_export.report import STYLE

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, panel in PANELS.items():
        with matplotlib.rc_context({**STYLE, **_OWN_STYLE}):
            path = _figure(found["runs"], panel, folder / f"{name}.svg")
        if path is not None:
            drawn[name] = path
    return drawn


def _figure(runs: list[Run], panel: Callable[[Any, Run], bool], path: Path) -> Path | None:
    """Draw a panel for each run, models in rows and threads in columns; return None if no run has these figures."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(run["model"] for run in runs))
    threads = list(dict.fromkeys(run["threads"] for run in runs))
    height = 0.24 * max(len(run["rivals"]) for run in runs) + 0.8 if panel in _BARS else 2.6
    figure = Figure(figsize=(5.2 * len(threads), height * len(models)), layout="constrained")
    grid = figure.subplots(len(models), len(threads), squeeze=False)
    some = False
    for row, model in enumerate(models):
        for column, count in enumerate(threads):
            axes = grid[row][column]
            run = next((run for run in runs if (run["model"], run["threads"]) == (model, count)), None)
            if run is None or not panel(axes, run):
                axes.set_axis_off()
                continue
            some = True
            axes.set_title(f"{model}, {count} thread{'s' if count > 1 else ''}")
    if some:
        figure.savefig(path, metadata={"Date": None})
    return path if some else None


# -- bars: one for each runtime ------------------------------------------------------------------------------------


def bars(axes: Any, run: Run, label: str, *parts: tuple[str, Callable[[Run], float | None]]) -> bool:
    """Draw a horizontal bar for each runtime and part, in the order of RIVALS; parts after the first are paler."""
    rows = [(row, [read(row) for _, read in parts]) for row in run["rivals"].values()]
    rows = [(row, values) for row, values in rows if any(value is not None for value in values)]
    if not rows:
        return False
    high = 0.8 / len(parts)
    for place, (row, values) in enumerate(rows):
        for number, value in enumerate(values):
            if value is not None:
                at = place + (number - (len(parts) - 1) / 2) * high
                colour = _COLOURS.get(row["runtime"], OTHER)
                axes.barh(at, value, 0.9 * high, color=colour, alpha=1 - 0.5 * number / len(parts))
                text = f" {value:,.0f}" if value >= 100 else f" {value:.3g}"
                axes.annotate(text, (value, at), va="center", fontsize=6.5)
    axes.set_yticks(range(len(rows)), [row["label"] for row, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    names = " and ".join(name for name, _ in parts if name)
    axes.set_xlabel(f"{label}{': ' if names else ''}{names}{' (paler)' if len(parts) > 1 else ''}")
    return True


def _cold(axes: Any, run: Run) -> bool:
    return bars(
        axes, run, "s",
        ("process to first token", lambda row: row.get("cold_start_s")),
        ("load", lambda row: row.get("load_s")),
    )  # fmt: skip


def _decode(axes: Any, run: Run) -> bool:
    lengths = sorted({_length(name) for row in run["rivals"].values() for name in row["token_s"] if "prompt" in name})
    parts = [(f"context {n}", lambda row, n=n: _ms(row["token_s"].get(f"prompt-{n}"))) for n in lengths]
    return bool(parts) and bars(axes, run, "ms per token", *parts)


def _memory(axes: Any, run: Run) -> bool:
    def read(key: str) -> Callable[[Run], float | None]:
        return lambda row: row["memory_worked"][key] / 1e6 if row["memory_worked"] else None

    return bars(axes, run, "MB", ("peak resident", read("peak")), ("anonymous", read("anonymous")))


def _disk(axes: Any, run: Run) -> bool:
    return bars(axes, run, "MB", ("graph and weights on disk", lambda row: row["disk_bytes"] / 1e6))


def share(row: Run, bandwidth: float) -> float | None:
    """Return the share of the memory bandwidth that reading the weights took, after the shortest decoded context."""
    steps = {_length(name): value for name, value in row["token_s"].items() if name.startswith("prompt-")}
    if not steps or not row["token_bytes"]:
        return None
    return float(row["token_bytes"] / bandwidth / steps[min(steps)])


def _roofline(axes: Any, run: Run) -> bool:
    bandwidth = run["bytes_per_second"]

    def percent(row: Run) -> float | None:
        reached = share(row, bandwidth)
        return None if reached is None else 100 * reached

    return bars(axes, run, f"weights read, % of {bandwidth / 1e9:.1f} GB/s", ("", percent))


# -- lines -----------------------------------------------------------------------------------------------------


def _line(axes: Any, points: Iterable[tuple[float, float]], **style: Any) -> bool:
    points = sorted(points)
    if points:
        axes.plot(*zip(*points, strict=True), markersize=3.5, linewidth=1.2, **style)
    return bool(points)


def _finish(axes: Any, x: str, y: str, log: str = "xy") -> None:
    axes.set(xlabel=x, ylabel=y)
    if "x" in log:
        axes.set_xscale("log", base=2)
    if "y" in log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    if at := sorted({value for line in axes.lines for value in line.get_xdata()}):
        axes.set_xticks(at, [f"{value:g}" for value in at])
        axes.minorticks_off()
    axes.grid(axis="y")
    if axes.lines:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _first(axes: Any, run: Run) -> bool:
    some = False
    for row in run["rivals"].values():
        points = [(_length(n), 1e3 * s) for n, s in row["first_s"].items() if n.startswith("prompt-")]
        colour = _COLOURS.get(row["runtime"], OTHER)
        style = "--" if "our graph" in row["label"] or row["runtime"] == "optimum_ort" else "-"
        some |= _line(axes, points, label=row["label"], color=colour, marker=_BITS[row["bits"]], linestyle=style)
    _finish(axes, "tokens of context before the question", "first token, ms")
    return some


def _context(axes: Any, run: Run) -> bool:
    some = False
    for key, row in run["rivals"].items():
        if key != f"ours-{row['bits']}":  # the other folders of a precision have the same line
            continue
        times = {name: 1e3 * value for name, value in row["first_s"].items()}
        lengths = [_length(name) for name in times if name.startswith("prompt-")]
        colour = _SHADES[row["bits"]]
        methods = {
            "prompt": ("-", lambda n, t=times: t.get(f"prompt-{n}")),
            "cached prefix": ("--", lambda n, t=times: t.get(f"cached-{n}")),
            "patch": (":", lambda n, t=times: t.get("patch")),
        }
        for method, (style, read) in methods.items():
            points = [(n, value) for n in lengths if (value := read(n)) is not None]
            some |= _line(axes, points, label=f"{method}, {row['bits']}", color=colour, linestyle=style, marker="o")
    _finish(axes, "tokens of context", "first token, ms")
    return some


def _ranks(axes: Any, run: Run) -> bool:
    some = False
    for bits, bench in run["patches"].items():
        points = [(rank, 100 * (ratio - 1)) for rank, ratio in rank_ratios(bench)]
        some |= _line(axes, points, label=bits, color=_SHADES[bits], marker=_BITS[bits])
    axes.set_xscale("symlog", base=2, linthresh=1)
    _finish(axes, "rank of a random patch in every slot", "slowdown per token, %", log="")
    return some


def rank_ratios(bench: Run) -> list[tuple[int, float]]:
    """Return the rank and the ratio of per-token time to the base, for each arm that measures a rank."""
    arms = [arm for arm in bench.get("arms", ()) if arm["label"].startswith(("random, rank", "base again"))]
    return [(arm["patch_rank"] or 0, arm["token_ratio_per_round"]) for arm in arms]


def _resident(axes: Any, run: Run, read: Callable[[Run], float | None], y: str) -> bool:
    some = False
    for bits, bench in run["patches"].items():
        points = [(r["patches"], v) for r in bench.get("resident", ()) if (v := read(r)) is not None]
        some |= _line(axes, points, label=bits, color=_SHADES[bits], marker=_BITS[bits])
    _finish(axes, "loaded patches of rank 16", y, log="x")
    axes.set_ylim(0, 1.2 * max((max(line.get_ydata()) for line in axes.lines), default=1.0))
    return some


def _switch(axes: Any, run: Run) -> bool:
    return _resident(axes, run, lambda row: row["switch_ms"], "switch, ms")


def _loaded(axes: Any, run: Run) -> bool:
    def grown(row: Run) -> float | None:
        return None if row["anonymous_bytes"] is None else row["anonymous_bytes"] / 1e6

    return _resident(axes, run, grown, "additional memory, MB")


def _batch(axes: Any, run: Run) -> bool:
    some = False
    for bits, batch in run["batches"].items():
        for key, style, label in (("base_ms", "--", "base"), ("patched_ms", "-", "different patches")):
            points = [(row["rows"], 1e3 * row["rows"] / row[key]) for row in batch.get("sizes", ())]
            colour = _SHADES[bits]
            some |= _line(axes, points, label=f"{bits}, {label}", color=colour, marker=_BITS[bits], linestyle=style)
    _finish(axes, "rows of the batch", "tokens per second, all rows")
    return some


def _length(name: str) -> int:
    return int(name.rpartition("-")[2])


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


PANELS: dict[str, Callable[[Any, Run], bool]] = {
    "decode": _decode,
    "roofline": _roofline,
    "first-token": _first,
    "context": _context,
    "cold-start": _cold,
    "memory": _memory,
    "disk": _disk,
    "ranks": _ranks,
    "switch": _switch,
    "loaded-patches": _loaded,
    "batch": _batch,
}
_BARS = {_decode, _roofline, _cold, _memory, _disk}
