"""Reasoning: the part of an answer that a model writes between tags before the answer itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PromptTail = Literal["open", "closed", "none"]
"""How a prompt ends: with an open tag, with reasoning that is closed (often empty), or with neither."""


@dataclass(frozen=True)
class ReasoningTags:
    """The tags around the reasoning of one family of models.

    Attributes:
        opening: the tag before reasoning.
        closing: the tag after it.
        special_ids: the ids of the tags that are special tokens of the tokenizer, by their text.
    """

    opening: str
    closing: str
    special_ids: Mapping[str, int]

    def tail_of(self, prompt: str) -> PromptTail:
        """Return how the text of a prompt ends."""
        end = prompt.rstrip()
        return "open" if end.endswith(self.opening) else "closed" if end.endswith(self.closing) else "none"


def recognise_reasoning_tags(template: str | None, special_ids: Mapping[str, int]) -> ReasoningTags | None:
    """Return the tags that a chat template shows; None if it shows none that are known.

    Args:
        template: the text of the chat template.
        special_ids: the ids of the tokenizer's special tokens, by their text.
    """
    return None


class ReasoningSplitter:
    """Splits a stream of text chunks into reasoning and answer.

    Args:
        tags: the tags of the model's family; None means that everything is answer.
        tail: how the prompt ends.
    """

    def __init__(self, tags: ReasoningTags | None, tail: PromptTail = "none") -> None:
        self._tags, self._tail = tags, tail

    def copy(self) -> ReasoningSplitter:
        """Return a splitter that continues from here, independently of this one."""
        return ReasoningSplitter(self._tags, self._tail)

    def push(self, chunk: str) -> tuple[str, str]:
        """Add a chunk of text and return what becomes certain: more of the reasoning, and more of the answer."""
        return "", chunk

    def flush(self) -> tuple[str, str]:
        """End the text and return what was held back."""
        return "", ""
