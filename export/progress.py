"""Progress on stderr: a bar for counted work, a ticking clock for work that cannot be counted."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def clock(label: str) -> Iterator[None]:
    """Show `label` with the seconds gone by, while a call that reports nothing of its own runs."""
    # Where stderr is a file or a pipe, one line at the start and one at the end are enough.
    interval = 0.5 if sys.stderr.isatty() else None
    with tqdm(desc=label, bar_format="{desc}: {elapsed}", leave=True) as bar:
        done = threading.Event()

        def tick() -> None:
            while interval is not None and not done.wait(interval):
                bar.refresh()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def bar(label: str, total: int, unit: str) -> tqdm:
    """A bar over `total` steps; use it as a context manager and call `update`."""
    return tqdm(desc=label, total=total, unit=unit, leave=True)
