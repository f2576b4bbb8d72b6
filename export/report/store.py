"""The summary of a report, stored in the patch file's description.

The tensors and their dtype stay unchanged, int8 with its scales included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tp_runtime.patch import MAX_REPORT, Patch

from .figures import BOTH, ENTRIES, EXACT, NO_PROMPT, PATCH, PROMPT, WEIGHTS, PatchReport, Point

# The names of series in the keys of a stored frontier, which the server's page draws.
_SERIES = {WEIGHTS: "weights", ENTRIES: "entries", BOTH: "both", EXACT: "exact"}


def store_summary(file: Path, patch: Patch, report: PatchReport) -> None:
    """Replace `file` by a copy whose description has the summary under `report`.

    The file is replaced only once the copy is written whole.

    Args:
        file: the patch file.
        patch: the patch as loaded from `file`.
        report: the figures measured on the patch.

    Raises:
        OutputError: the file changed since it was loaded, and is no patch file any more.
        OSError: the file cannot be written; the old file is still there.
    """
    replace(patch, config=replace(patch.config, report=summary(report))).save(file)


def summary(report: PatchReport) -> dict[str, float]:
    """Return the few numbers, by name, that are stored in the description of the patch file."""
    patch, prompt = report.variant(PATCH), report.variant(PROMPT)
    held, kept = patch.held_out, "accuracy_exact_kept" if report.stop else "accuracy_kept"  # as in `evaluate`
    figures: dict[str, float | None] = {
        "gap_closed": held.gap_closed,
        "gap_closed_se": held.gap_closed_se,
        "gap_closed_first": held.gap_closed_first,
        "gap_closed_first_se": held.gap_closed_first_se,
        "top1_agreement": held.top1_agreement,
        "top1_agreement_first": held.top1_agreement_first,
        kept: held.kept,
        f"{kept}_se": held.kept_se,
        "kl": held.kl,
        "kl_no_prompt": report.variant(NO_PROMPT).held_out.kl,
        "queries": report.queries,
        "unrelated_text_kl": patch.text_kl,
        "unrelated_text_kl_prompt": prompt.text_kl,
        "session_bytes_saved": prompt.session_bytes - patch.session_bytes,
        "first_token_ms": patch.first_token_ms,
        "token_ms": patch.token_ms,
    }
    if report.long is not None:
        ended = {ending.name: ending.ended for ending in report.long.endings}
        figures |= {"ends_turn": ended[PATCH], "ends_turn_prompt": ended[PROMPT]}
    for turn in report.turns.turns:
        figures |= {
            f"gap_closed_turn_{turn.turn}": turn.own.gap_closed,
            f"gap_closed_turn_{turn.turn}_se": turn.own.gap_closed_se,
        }
    if report.frontier is not None:
        room = MAX_REPORT - sum(value is not None for value in figures.values())
        figures |= frontier_figures(report.frontier.points, room)
    return {name: round(value, 6) for name, value in figures.items() if value is not None}


def frontier_figures(points: Sequence[Point], room: int) -> dict[str, float | None]:
    """Return the frontier as figures: `frontier_SERIES_BYTES` is the gap that a file of this size closes.

    Only the frontier itself is kept: a file that closes less than a smaller one is left out. So is what has no file (a
    shorter prompt) and the patch of the report, whose own figures stand beside these.

    Args:
        points: the points of the plot.
        room: the largest number of figures; if there are more, the smallest files are left out.
    """
    kept: list[dict[str, float | None]] = []
    most = float("-inf")
    files = [(point.bytes, point) for point in points if point.bytes is not None and point.series in _SERIES]
    for size, point in sorted(files, key=lambda pair: pair[0]):
        gap = point.held_out.gap_closed
        if gap is not None and gap > most:
            most, name = gap, f"frontier_{_SERIES[point.series]}_{size}"
            kept.append({name: gap, f"{name}_se": point.held_out.gap_closed_se})
    return {name: value for pair in kept[len(kept) - min(len(kept), room // 2) :] for name, value in pair.items()}
