"""What a patch is fitted on: the teacher's dialogues, dialogues that restate the context, and the cached context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..queries import statements
from ..rollout import Context, Dialogue, restated_dialogues

RESTATED_CONTEXT = 64  # tokens; a longer context is restated, because queries look at a part of it only
LONG_CONTEXT = 100  # tokens; of the built-in questions, half make room for questions about a longer context


@dataclass(frozen=True)
class Calibration:
    """The rows of a fit.

    Attributes:
        context: the context; None for a patch that only repairs a quantised base.
        dialogues: the teacher's answers to the calibration queries.
        restated: dialogues that restate the context.
    """

    context: Context | None
    dialogues: Sequence[Dialogue]
    restated: Sequence[Dialogue] = ()


def restate(context: Context) -> list[Dialogue]:
    """Return the dialogues that restate a long context to a chat model; none for a short context.

    A completion-style model gets none: its context is a list of examples, and repeating them rewards copying one of
    them instead of following them.
    """
    long = context.beginning is not None and len(context.beginning.teacher) > RESTATED_CONTEXT
    text = context.prompting.context
    if not long or text is None or context.prompting.codec.style != "chat":
        return []
    return restated_dialogues(context.prompting, statements(text), context.window)
