"""Dialogues that restate the context, for which nothing has to be generated.

Answers to queries look at a part of a long context only, and entries that nobody looks at look as if they did not
matter. These dialogues look at all of it: the context itself as the answer to a request to repeat it, in chunks, and
for each of its sentences a question whether it is so, with an answer that says yes and repeats it.
"""

from __future__ import annotations

from collections.abc import Sequence

from .prompting import Prompting
from .sequences import Dialogue

_REPEAT = "Repeat the instructions above."
_CHUNK, _OVERLAP = 256, 32  # tokens: chunks overlap, so that every token has some of its own text in front


def restated_dialogues(prompting: Prompting, sentences: Sequence[str], window: int) -> list[Dialogue]:
    """Return dialogues that repeat the context, and dialogues that echo its sentences.

    Args:
        prompting: how a chat model is asked with and without the context.
        sentences: the sentences of the context.
        window: the context window. Chunks are shorter where whole ones do not fit, and what does not fit is left out.
    """
    codec = prompting.codec
    assert prompting.context is not None
    text = codec.render(prompting.context, raw=True)
    room = window - len(prompting.teacher(_REPEAT)) + 1  # the last token is predicted, and not run
    chunk = min(_CHUNK, room)
    starts = range(0, len(text), chunk - _OVERLAP) if chunk > _OVERLAP else range(0)
    found = [_dialogue(prompting, _REPEAT, text[start : start + chunk]) for start in starts]
    for sentence in sentences:
        answer = codec.render(f"Yes. {sentence}", raw=True)
        found.append(_dialogue(prompting, f"Is it right that {_inside(sentence)}?", answer))
    return [dialogue for dialogue in found if len(dialogue.teacher()) <= window]


def _dialogue(prompting: Prompting, query: str, answer: Sequence[int]) -> Dialogue:
    return Dialogue(tuple(prompting.teacher(query)), tuple(prompting.student(query)), tuple(answer))


def _inside(sentence: str) -> str:
    """Return the sentence as a clause: without its full stop, and with a small first letter where it is no name."""
    clause = sentence.rstrip(".!")
    first = clause.split(" ", 1)[0]
    return clause if first == "I" or first[1:2].isupper() else clause[:1].lower() + clause[1:]
