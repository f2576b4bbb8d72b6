"""The grammar of an answer that has to call a tool: the notation of the model's family around the tool's schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .reasoning import PromptTail, ReasoningTags
from .tool_calls import ToolFormat


def tool_constraint(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any],
    notation: ToolFormat | None,
    tags: ReasoningTags | None = None,
    tail: PromptTail = "none",
) -> str | None:
    """Return a grammar in llguidance's Lark notation that keeps the answer to calls of the tools.

    Args:
        tools: the tools of the request, as `checked_tools` returns them.
        tool_choice: the choice, as `checked_tool_choice` returns it: "required" means one call or more of any tools, an
            object means one call of that tool; "auto" and "none" constrain nothing.
        notation: the notation of the model's family (`TextCodec.tool_format`); None writes each call as the object
            {"name": ..., "arguments": {...}}.
        tags: the tags around reasoning (`TextCodec.reasoning_tags`), which may come before the calls.
        tail: how the prompt ends (`TextCodec.prompt_tail`).

    Returns:
        The grammar; None if the choice constrains nothing.
    """
    return None
