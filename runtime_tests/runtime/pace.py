"""A pace at which the batches of a server run, so that a test can act between two steps."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tp_runtime.text import TextBatch

_PATIENCE = 60.0  # seconds after which a step fails that no test allowed


class Pace:
    """Lets a batch run freely, or only some steps, until a test says otherwise.

    Args:
        step: the step of a batch.
    """

    def __init__(self, step: Any) -> None:
        self._step, self._left = step, None  # type: Any, int | None
        self._changed = threading.Condition()

    def allow(self, steps: int | None) -> None:
        """Let this many further steps run; None lets all run."""
        with self._changed:
            self._left = steps
            self._changed.notify_all()

    def spent(self) -> bool:
        """Return whether no step is left of those that were allowed."""
        with self._changed:
            return not self._left

    def step(self, batch: Any, *args: Any, **options: Any) -> Any:
        """Run a step of a batch when one is allowed."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._left is None or self._left > 0, _PATIENCE):
                raise TimeoutError("no test allowed a further step")
            self._left = None if self._left is None else self._left - 1
        return self._step(batch, *args, **options)


def set_pace(patch: pytest.MonkeyPatch) -> Pace:
    """Return the pace of every batch until the patch is undone."""
    made = Pace(TextBatch.step)
    patch.setattr(TextBatch, "step", lambda batch, *args, **options: made.step(batch, *args, **options))
    return made
