"""The messages of a chat and the turns that they form.

A turn is a user message and everything up to the next one: the model's answers, its tool calls and the tools' results.
Messages in front of the first user message, such as a greeting by the model, form a turn of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from ..text import Message, plain_objects

Messages = tuple[dict[str, Any], ...]

_WANTED = 'a text, a message {"role": str, "content": str}, or a list of messages'


def new_messages(value: str | Message | Sequence[Message]) -> Messages:
    """Return what is sent to a chat as messages of the chat's own, which no caller can change.

    Args:
        value: the text of a user message, a message, or a list of messages.

    Raises:
        RequestError: the value is none of these, a message is a system message or holds something that JSON cannot
            hold, or the last message is the model's own. What else a message must have is checked with the request.
    """
    if isinstance(value, str):
        return ({"role": "user", "content": value},)
    messages = plain_objects([value] if isinstance(value, Mapping) else value, "message", _WANTED)
    if not messages:
        raise RequestError("there is no message", field="message", got="an empty list", wanted=_WANTED)
    for number, message in enumerate(messages):
        if message.get("role") == "system":
            raise RequestError(
                "a chat has one system message, which is not part of its turns",
                field=f"message[{number}].role",
                got="system",
                wanted="user, tool, or another role of the model's template",
                fix="call set_system(text)",
            )
    if messages[-1].get("role") == "assistant":
        raise RequestError(
            "the last message is the model's own, so there is nothing to answer",
            field="message.role",
            got="assistant",
            wanted="user or tool",
            fix="put the message that is to be answered last",
        )
    return tuple(messages)


def turn_starts(messages: Messages) -> list[int]:
    """Return the index of the first message of each turn, in order."""
    users = [number for number, message in enumerate(messages) if message.get("role") == "user"]
    return users if not messages or users[:1] == [0] else [0, *users]


def last_turn(messages: Messages) -> int:
    """Return the index of the last user message.

    Raises:
        RequestError: there is none.
    """
    users = [number for number, message in enumerate(messages) if message.get("role") == "user"]
    if not users:
        raise RequestError(
            "the chat has no turn yet", field="messages", got=f"{len(messages)} messages", wanted="a turn"
        )
    return users[-1]


def without_oldest(messages: Messages, turns: int) -> Messages:
    """Return the messages without the first turns."""
    return messages[turn_starts(messages)[turns] :] if turns else messages
