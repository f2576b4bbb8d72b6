"""The beginning in which prompts with a context and prompts without it differ."""

from __future__ import annotations

from tp_runtime.text import Beginning, beginning_of, beginnings_of, writes_the_date


def test_the_beginning_is_what_differs_in_front_of_every_query() -> None:
    prompts = [([1, 7, 8, 9, *query, 4], [1, 6, *query, 4]) for query in ([20, 21], [22], [20, 23, 24])]
    assert beginning_of(prompts) == Beginning((1, 7, 8, 9), (1, 6))
    alone = [([1, 7, 8, *query], [*query]) for query in ([20], [21, 22])]  # without a first token of its own
    assert beginning_of(alone) == Beginning((1, 7, 8), ())


def test_ids_that_agree_by_chance_do_not_make_other_beginnings() -> None:
    """The context ends with the id that stands in front of the query without it."""
    prompts = [([1, 7, 6, *query], [1, 6, *query]) for query in ([20], [21, 22])]
    assert beginning_of(prompts) == Beginning((1, 7), (1,))


def test_prompts_that_differ_elsewhere_have_no_one_beginning() -> None:
    prompts = [([1, 7, *query, 5], [1, *query, 4]) for query in ([20], [21, 22])]
    assert len(beginnings_of(prompts)) == 2 and beginning_of(prompts) is None
    assert beginning_of([([1, 7, 20, 5], [1, 20, 4])]) is None  # nothing follows that could be run
    same = [([1, 20], [1, 20]), ([1, 21], [1, 21])]  # without a context there is nothing to replace
    assert beginning_of(same) is None


def test_only_a_template_that_asks_for_the_time_writes_the_date() -> None:
    assert writes_the_date("{{ strftime_now('%d %b') }}")
    assert not writes_the_date("{{ messages[0].content }}") and not writes_the_date(None)
