"""Uses: each ends once, by `end` or because it was dropped, and the first of those that go on is known."""

from __future__ import annotations

import threading

from tp_runtime.session import Use, Uses


def begun(uses: Uses) -> Use:
    use = Use(uses)
    use.begin()
    return use


def test_a_use_goes_on_until_it_ends_or_is_dropped() -> None:
    uses = Uses()
    waiting, one, two = Use(uses), begun(uses), begun(uses)
    assert waiting not in uses
    assert len(uses) == 2 and uses.first() is one and one in uses
    one.end()
    one.end()  # an end twice has no effect
    assert len(uses) == 1 and uses.first() is two and one not in uses
    del two
    assert len(uses) == 0 and uses.first() is None


def test_a_use_of_one_thing_is_not_a_use_of_another() -> None:
    one, two = Uses(), Uses()
    use = begun(one)
    assert use in one and use not in two
    assert 5 not in one and None not in one


def test_of_threads_that_begin_together_exactly_one_is_first() -> None:
    for _ in range(50):
        uses, meet = Uses(), threading.Barrier(4)
        first: list[bool] = []

        def begin(uses: Uses = uses, meet: threading.Barrier = meet, first: list[bool] = first) -> None:
            meet.wait(30)
            use = begun(uses)
            first.append(uses.first() is use)
            meet.wait(30)

        threads = [threading.Thread(target=begin) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(first) == [False, False, False, True]
        assert len(uses) == 0
