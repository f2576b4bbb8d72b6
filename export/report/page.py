"""The report as one self-contained HTML page: style, plots and text are all inside the file."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tp_runtime.storage import Kind, atomic_file

from ..measure import error_text
from . import plots
from .figures import PATCH, PatchReport, Report
from .frontier_plot import frontier

_TEMPLATE = "page.html.j2"
_TITLE_ENDS = ": patch report</title>"  # the end of the title in the template
_LARGEST_HEAD = 2**16
_SPACE = "\N{NO-BREAK SPACE}"


def write_page(report: Report, path: Path) -> None:
    """Write the page; `path` changes only once the whole page is written.

    Raises:
        OutputError: `path` holds something else than such a page.
        OSError: the page cannot be written; a page that was there before is still there.
    """
    text = render_page(report)
    with atomic_file(path, PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _no_page(file: Path) -> str | None:
    with file.open("rb") as handle:
        head = handle.read(_LARGEST_HEAD).partition(b"<style>")[0]
    return None if _TITLE_ENDS.encode() in head else "another file"


PAGE = Kind("a page that tp-export report wrote", _no_page)


def render_page(report: Report) -> str:
    """Return the page's HTML; text that models and users wrote is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": _percent,
        "share": _share,
        "error": error_text,
        "size": _size,
        "ms": _ms,
        "kl": _kl,
    }
    template = environment.from_string((files(__package__) / _TEMPLATE).read_text(encoding="utf-8"))
    drawn = [(patch, _plots(patch)) for patch in report.patches]
    return template.render(report=report, patches=drawn)


def _plots(patch: PatchReport) -> dict[str, Any]:
    """Return each plot by its name as SVG marked safe for the template; None or empty if there is nothing to draw."""
    svg: dict[str, str | None] = {
        "positions": plots.positions(patch.positions),
        "layers": plots.layers(patch.layers) if patch.layers else "",
        "frontier": frontier(patch.frontier.points) if patch.frontier else "",
        "strengths": "" if patch.sweep is None else plots.strengths(patch.sweep),
        "long": plots.long_answers(patch.long.forced, patch.long.own) if patch.long else None,
        "turns": plots.turns(patch.turns.turns) if patch.turns.turns else None,
        "methods": plots.methods(patch.fits.methods, patch.variant(PATCH).held_out) if patch.fits.methods else None,
    }
    return {name: None if text is None else Markup(text) for name, text in svg.items()}


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}{_SPACE}%"


def _share(value: float | None, error: float | None) -> str:
    """Return a share with its standard error, both in percent."""
    return "–" if value is None else f"{100 * value:.1f}{error_text(error, _SPACE)}{_SPACE}%"


def _kl(value: float | None) -> str:
    if value is None:
        return "–"
    value = max(value, 0.0)  # rounding can make a KL of zero slightly negative
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 100 else f"{value:.3g}"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}{_SPACE}ms"


def _size(value: int | None) -> str:
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value / 1e6:.2f}{_SPACE}MB" if value >= 1e5 else f"{value / 1e3:.1f}{_SPACE}kB"
