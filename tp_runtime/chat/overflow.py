"""What a chat does when it has filled the context window: which of its oldest turns an answer is given without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ..errors import RequestError, shown
from ..text import EncodedRequest
from .turns import Messages, turn_starts

Overflow = Literal["error", "drop_oldest"]
"""`error` refuses a message that no longer fits; `drop_oldest` leaves out whole turns, the oldest first."""

_CHOICES = ("error", "drop_oldest")


def require_overflow(value: object) -> None:
    """Raise RequestError unless the value says what to do about a full context window."""
    if not isinstance(value, str) or value not in _CHOICES:
        wanted = " or ".join(map(repr, _CHOICES))
        raise RequestError("the value is unknown", field="overflow", got=shown(value), wanted=wanted)


def dropped_turns(messages: Messages, encode: Callable[[Messages], EncodedRequest], context_window: int) -> int:
    """Return how many of the oldest turns must go until the prompt and the longest answer fit the context window.

    The system message and a patch's entries are in every prompt that `encode` makes, so they always stay.

    Args:
        messages: the chat, up to the message that is to be answered.
        encode: the function that encodes the request for an answer to some of these messages.
        context_window: the number of positions that the model has.

    Raises:
        RequestError: even the last turn alone does not fit; or `encode` refuses the messages.
    """
    starts = turn_starts(messages)

    def excess(turns: int) -> tuple[int, EncodedRequest]:
        request = encode(messages[starts[turns] :])
        prefix = request.patch.bound.prefix
        taken = (0 if prefix is None else prefix.skipped) + len(request.tokens) + request.max_new_tokens
        return taken - context_window, request

    if excess(0)[0] <= 0:
        return 0
    fewest, most = 1, len(starts) - 1
    over, request = excess(most)
    if over > 0:
        raise RequestError(
            "the last turn of the chat and its answer do not fit the context window",
            field="prompt",
            got=f"{len(request.tokens)} tokens and max_new_tokens={request.max_new_tokens}",
            wanted=f"at most {len(request.tokens) + request.max_new_tokens - over} together",
            fix="shorten the message or the system message, or pass a smaller max_new_tokens",
        )
    # Fewer turns never take more tokens, so the number is found in a few encodings.
    while fewest < most:
        middle = (fewest + most) // 2
        if excess(middle)[0] > 0:
            fewest = middle + 1
        else:
            most = middle
    return most
