"""Show progress on stderr: a bar for work that has steps, and a running clock for work that has none."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def clock(label: str) -> Iterator[None]:
    """Show `label` and the elapsed time within the context, for calls that report no progress themselves."""
    # If stderr is a file or a pipe, one line at the start and one at the end are enough.
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
    """Return a bar over `total` steps; use it as a context manager and call `update` after each step."""
    return tqdm(desc=label, total=total, unit=unit, leave=True)
