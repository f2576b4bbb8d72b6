"""The frontier among the figures that `tp-export report --store` writes into a patch file."""

from __future__ import annotations

from tp_export.report.figures import BOTH, ENTRIES, EXACT, SHORTER, THIS, WEIGHTS, HeldOut, Point
from tp_export.report.store import frontier_figures


def point(series: str, size: int | None, gap: float | None, error: float | None = 0.01) -> Point:
    held_out = HeldOut(
        kl=0.1,
        kl_first=0.1,
        gap_closed=gap,
        gap_closed_se=error,
        gap_closed_first=gap,
        gap_closed_first_se=error,
        top1_agreement=1.0,
        top1_agreement_first=1.0,
        right=None,
        kept=None,
        kept_se=None,
    )
    return Point(series=series, label="", dtype="i8", bytes=size, context_tokens=0, held_out=held_out)


def test_a_point_is_kept_if_it_closes_more_than_every_smaller_file() -> None:
    points = [point(EXACT, 900, 1.0), point(WEIGHTS, 100, 0.6), point(ENTRIES, 200, 0.5), point(BOTH, 300, 0.8, None)]
    assert frontier_figures(points, 64) == {
        "frontier_weights_100": 0.6,
        "frontier_weights_100_se": 0.01,
        "frontier_both_300": 0.8,
        "frontier_both_300_se": None,
        "frontier_exact_900": 1.0,
        "frontier_exact_900_se": 0.01,
    }


def test_what_has_no_file_no_gap_or_is_the_patch_itself_is_left_out() -> None:
    assert frontier_figures([point(SHORTER, None, 0.9), point(THIS, 50, 0.9), point(WEIGHTS, 100, None)], 64) == {}


def test_the_largest_files_are_kept_if_there_is_no_room_for_all() -> None:
    points = [point(ENTRIES, size, size / 1000) for size in (100, 200, 300)]
    assert [name for name in frontier_figures(points, 5) if "_se" not in name] == [
        "frontier_entries_200",
        "frontier_entries_300",
    ]
    assert frontier_figures(points, 1) == {}
