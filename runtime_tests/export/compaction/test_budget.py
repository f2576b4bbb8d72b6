"""The budget: the number of entries of each layer, for an average over the layers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tp_export.compaction import split_budget

GEMMA = [512 if layer % 6 != 5 else None for layer in range(18)]  # 3 of 18 layers see everything


def test_layers_of_one_kind_get_the_average() -> None:
    assert split_budget(64, [None] * 4, 400) == (64,) * 4
    assert split_budget(64, [512] * 4, 400) == (64,) * 4
    assert split_budget(64, [None] * 4, 50) == (50,) * 4
    assert split_budget(64, [16] * 4, 400) == (15,) * 4  # no token of the text sees more


@pytest.mark.parametrize(
    ("average", "context", "full", "windowed"),
    [
        (64, 402, 224, 32),
        (128, 777, 448, 64),
        (128, 402, 402, 73),  # full layers whole, because that leaves the others enough
        (110, 402, 385, 55),  # here it would not
        (200, 402, 402, 159),
        (200, 653, 653, 109),
        (2**31, 777, 777, 511),
        (2**31, 30, 30, 30),
        (16, 402, 16, 16),  # too few for windowed layers to give any away
        (48, 402, 128, 32),
    ],
)
def test_full_layers_get_what_windowed_ones_leave(average: int, context: int, full: int, windowed: int) -> None:
    assert split_budget(average, GEMMA, context) == tuple(full if window is None else windowed for window in GEMMA)


@given(
    st.integers(1, 300),
    st.lists(st.one_of(st.none(), st.sampled_from([9, 64, 512])), min_size=1, max_size=12),
    st.integers(1, 600),
)
def test_no_layer_gets_more_than_it_can_use_and_the_sum_keeps_to_the_average(
    average: int, windows: list[int | None], context: int
) -> None:
    windows = [window if window is None else min(w for w in windows if w) for window in windows]  # one size in a model
    counts = split_budget(average, windows, context)
    assert all(1 <= n <= min(context, context if w is None else w - 1) for n, w in zip(counts, windows, strict=True))
    assert sum(counts) <= average * len(windows)
    assert len(set(zip(counts, windows, strict=True))) == len(set(windows))  # one count for each kind of layer
    whole = [context if w is None else min(context, w - 1) for w in windows]
    slack = average * len(windows) - sum(counts)
    # What is left does not suffice for one more entry in every layer of a kind that could use it.
    for kind in set(windows):
        of_kind = [i for i, w in enumerate(windows) if w == kind]
        assert counts[of_kind[0]] == whole[of_kind[0]] or slack < len(of_kind)
