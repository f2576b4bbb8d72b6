"""Calls of tools in a model's answer: what a call is, which notation a model was trained on, and how calls are found.

A call that is malformed stays in the text of the answer: a small model errs often, and what it wrote must not be lost.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from .tool_families import BY_FAMILY, NOTATIONS, Notation
from .tool_json import MALFORMED, FoundCall, Parameters, whole_answer

# Malformed calls of one answer. Each can cost a look at the whole rest of the text, and an answer that repeats an
# opening without end must not take time that grows with its square.
_MOST_FAILURES = 64
_ID_LENGTH = 9  # letters and digits; templates of Mistral's models take ids of no other length


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
        return {"type": "function", "id": self.id, "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class ToolFormat:
    """The notation in which a model writes calls.

    Attributes:
        family: the name of the notation, e.g. "hermes"; "json" is an object with name and arguments and nothing else.
        special_ids: the ids of the notation's markers that are special tokens of the tokenizer, by their text.
    """

    family: str
    special_ids: Mapping[str, int]

    @property
    def notation(self) -> Notation:
        """The notation itself."""
        return BY_FAMILY[self.family]


def recognise_tool_format(template: str, special_ids: Mapping[str, int]) -> ToolFormat:
    """Return the notation of calls that a chat template shows; if it shows none that is known, that of plain JSON.

    Args:
        template: the text of the chat template.
        special_ids: the ids of the tokenizer's special tokens, by their text.
    """
    notation = next(known for known in NOTATIONS if all(part in template for part in known.shown_by))
    return ToolFormat(notation.family, {text: special_ids[text] for text in notation.markers if text in special_ids})


def parse_tool_calls(
    text: str, form: ToolFormat, tools: Iterable[Mapping[str, Any]] = ()
) -> tuple[str, list[ToolCall]]:
    """Find the calls in the text of a finished answer. This never raises: what is malformed stays in the text.

    After 64 malformed calls, the rest stays in the text too.

    Args:
        text: the answer, decoded so that the notation's markers are in it (`TextCodec.decode` with keep_markers=True).
        form: the notation of the model.
        tools: the tools of the request, as `checked_tools` returns them. A notation whose arguments are plain text
            takes the types of values from them, and calls without markers count only if they name one of them.

    Returns:
        The text without the calls and the spaces around them, and the calls in order.
    """
    notation = form.notation
    parameters: Parameters = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    if notation.bare:
        try:
            return "", [_tool_call(found) for found in whole_answer(text, 0, parameters)[0]]
        except MALFORMED:
            pass
    kept, calls, done, search, failures = "", [], 0, 0, 0
    while failures < _MOST_FAILURES and (start := first_opening(text, notation, search)) >= 0:
        try:
            found, end = notation.read(text, start, parameters)
        except MALFORMED:
            search, failures = start + 1, failures + 1
            continue
        kept += text[done:start].rstrip()
        calls += [_tool_call(call) for call in found]
        done = search = end
    rest = text[done:]
    return (kept + rest if rest.strip() or not calls else kept), calls


def first_opening(text: str, notation: Notation, at: int = 0) -> int:
    """Return the index of the first text at or after `at` that calls can begin with; -1 if there is none."""
    found = _openings(notation.openings).search(text, at)
    return -1 if found is None else found.start()


@cache
def _openings(openings: tuple[str, ...]) -> re.Pattern[str]:
    # One search for all: one for each would go through the whole text for an opening that is not in it, for every call.
    return re.compile("|".join(map(re.escape, openings)) if openings else "(?!)")


def _tool_call(found: FoundCall) -> ToolCall:
    import secrets  # most completions call no tool, and the import delays the first token of a process

    letters = string.ascii_letters + string.digits
    new = "".join(secrets.choice(letters) for _ in range(_ID_LENGTH))
    return ToolCall(found.id or new, found.name, found.arguments)
