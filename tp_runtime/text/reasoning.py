"""Reasoning: the part of an answer that a model writes between tags before the answer itself.

A chat template shows which tags its model was trained on. Some templates end the prompt with the opening tag, so that
the answer begins within the reasoning; some end it with an empty pair of tags, so that there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .detokenize import overlap

PromptTail = Literal["open", "closed", "none"]
"""How a prompt ends: with an open tag, with reasoning that is closed (often empty), or with neither."""

# The opening and the closing tag of each family, in the order in which a template is searched for them.
_TAGS = (
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command R7B, Command A
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("[THINK]", "[/THINK]"),  # Magistral, Ministral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<mm:think>", "</mm:think>"),  # MiniMax
    ("<think>", "</think>"),  # Qwen, SmolLM, DeepSeek, Granite, GLM, LFM, Nemotron, Phi
)


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
    for opening, closing in _TAGS:
        if template is not None and opening in template and closing in template:
            # A tag can be a special token and a word after it, as Gemma's is.
            special = {text: i for text, i in special_ids.items() if text and text in opening + closing}
            return ReasoningTags(opening, closing, special)
    return None


class ReasoningSplitter:
    """Splits a stream of text chunks into reasoning and answer.

    Reasoning counts only at the beginning: a tag within an answer is text, as in an answer about tags. The spaces and
    line breaks around reasoning are part of neither. The result does not depend on how the text is divided into chunks.

    Args:
        tags: the tags of the model's family; None means that everything is answer.
        tail: how the prompt ends.
    """

    def __init__(self, tags: ReasoningTags | None, tail: PromptTail = "none") -> None:
        self._tags = tags
        # "start": an opening tag may follow. "reasoning": within the tags. "gap": after the closing tag. "answer": all
        # that follows is answer.
        self._place = "answer" if tags is None or tail == "closed" else "start"
        self._open = tail == "open"
        self._held = ""
        self._begun = False  # whether any reasoning was returned

    def copy(self) -> ReasoningSplitter:
        """Return a splitter that continues from here, independently of this one."""
        made = object.__new__(ReasoningSplitter)
        made.__dict__.update(self.__dict__)
        return made

    def push(self, chunk: str) -> tuple[str, str]:
        """Add a chunk of text and return what becomes certain: more of the reasoning, and more of the answer."""
        if self._tags is None or self._place == "answer":
            return "", chunk
        self._held += chunk
        if self._place == "start":
            self._start(self._tags.opening)
        reasoning = self._reasoning(self._tags.closing) if self._place == "reasoning" else ""
        if self._place == "gap":
            self._held = self._held.lstrip()
            self._place = "answer" if self._held else "gap"
        if self._place != "answer":
            return reasoning, ""
        answer, self._held = self._held, ""
        return reasoning, answer

    def flush(self) -> tuple[str, str]:
        """End the text and return what was held back. Reasoning that no tag closes is reasoning to its end."""
        held, self._held = self._held, ""
        if self._place == "reasoning" or (self._place == "start" and self._open):
            return held.rstrip() if self._begun else held.strip(), ""
        return "", held

    def _start(self, opening: str) -> None:
        """Go on to "reasoning" or "answer" as soon as it is certain whether the text begins with the tag."""
        begun = self._held.lstrip()
        if begun.startswith(opening):
            # A model may write the tag again that the prompt ends with.
            self._place, self._held = "reasoning", begun[len(opening) :]
        elif not opening.startswith(begun):
            self._place = "reasoning" if self._open else "answer"

    def _reasoning(self, closing: str) -> str:
        """Return the reasoning that is certain, and go on to "gap" if the tag closes it."""
        if not self._begun:
            self._held = self._held.lstrip()
        at = self._held.find(closing)
        if at >= 0:
            reasoning, self._held, self._place = self._held[:at].rstrip(), self._held[at + len(closing) :], "gap"
            return reasoning
        # Spaces are held back, because they are not part of the reasoning if the tag follows.
        safe = len(self._held[: len(self._held) - overlap(self._held, closing)].rstrip())
        reasoning, self._held = self._held[:safe], self._held[safe:]
        self._begun = self._begun or bool(reasoning)
        return reasoning
