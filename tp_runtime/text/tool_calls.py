"""Calls of tools in a model's answer: what a call is, and the notations in which families of models write calls.

A chat template shows which notation its model was trained on. A call that is malformed stays in the text of the answer:
a small model errs often, and what it wrote must not be lost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that the model asks for.

    Attributes:
        id: the name of this call, which the tool's answer repeats as tool_call_id: nine letters or digits, or what the
            model wrote.
        name: the name of the tool.
        arguments: its arguments by name, values of JSON. They need not fit the tool's schema, unless tool_choice
            constrained the output.
    """

    id: str
    name: str
    arguments: dict[str, Any]

    def message_entry(self) -> dict[str, Any]:
        """Return the call as an entry of `tool_calls` in the assistant's message of the next turn."""
        return {
            "type": "function",
            "id": self.id,
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True)
class ToolFormat:
    """The notation in which one family of models writes calls.

    Attributes:
        family: the name of the family, e.g. "hermes".
        special_ids: the ids of the notation's markers that are special tokens of the tokenizer, by their text.
    """

    family: str
    special_ids: Mapping[str, int]


def recognise_tool_format(template: str | None, special_ids: Mapping[str, int]) -> ToolFormat | None:
    """Return the notation of calls that a chat template shows; None if it shows none that is known.

    Args:
        template: the text of the chat template.
        special_ids: the ids of the tokenizer's special tokens, by their text.
    """
    return None


def parse_tool_calls(
    text: str, notation: ToolFormat | None, names: Collection[str] | None = None
) -> tuple[str, list[ToolCall]]:
    """Find the calls in the text of a finished answer. This never raises: what is malformed stays in the text.

    Args:
        text: the answer, decoded so that the notation's markers are in it (`TextCodec.decode` with keep_markers=True).
        notation: the notation of the model's family; None finds nothing.
        names: the names of the request's tools; None if they are unknown.

    Returns:
        The text without the calls, and the calls in order.
    """
    return text, []
