"""This module decodes token ids to text, one token at a time, and finds stop strings in the stream.

Both classes hold text back until it is certain: the decoder while a character is incomplete, and the scanner while the
end of the text could be the beginning of a stop string. Neither depends on how the tokens were produced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ..errors import RequestError, shown

_REPLACEMENT = "\ufffd"
_MAX_INCOMPLETE = 3  # an incomplete UTF-8 character has at most 3 bytes, and so at most 3 tokens
_WINDOW = 16  # ids to decode together before malformed text is let out; well-formed text needs far fewer


class IncrementalDecoder:
    """Decodes a stream of token ids to chunks of text that never split a character.

    The chunks together are `decode(all ids)`. The decoder decodes a short window: the tokens of the last chunk, whose
    text was already returned, and the new tokens. It keeps the old tokens because tokenizers decode the first token
    differently (SentencePiece drops its space), and because they decode a run of byte tokens as one.

    There is one exception. If any byte in a run of byte-fallback tokens is malformed, `tokenizers` replaces the whole
    run with U+FFFD, including characters before that byte, which were already returned. Within such a run, the chunks
    differ from `decode(all ids)` in which characters are U+FFFD and in their number. The text around it is the same.

    Args:
        decode: a function that converts token ids to text, such as `TextCodec.decode`.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the window
        self._old = 0  # the number of ids in the window whose text was already returned
        self._text = ""  # decode(window)
        self._sent = 0  # the number of characters of `_text` that were already returned

    def copy(self) -> IncrementalDecoder:
        """Return a decoder that continues from here, independently of this one."""
        made = object.__new__(IncrementalDecoder)
        made.__dict__.update(self.__dict__)
        made._ids = list(self._ids)
        return made

    def push(self, token_id: int) -> str:
        """Add one token and return the text that becomes certain with it, which may be empty.

        The cost does not depend on the number of earlier tokens.
        """
        self._ids.append(token_id)
        text = self._decode(self._ids)
        # U+FFFD at the end may be the beginning of a character, so it is not certain.
        certain = len(text.rstrip(_REPLACEMENT))
        if text and text == self._text and certain == len(text):
            # A token without text (a skipped special token) must not become the first one of the window, because the
            # next token would then be decoded as the start of a text.
            self._ids.pop()
            return ""
        self._text = text
        chunk = text[self._sent : certain]
        self._sent = max(self._sent, certain)
        if chunk and certain == len(text):
            self._drop(self._old)
            self._old = len(self._ids)
        elif len(self._ids) % _WINDOW == 0:
            chunk += self._shorten()
        return chunk

    def flush(self) -> str:
        """End the stream: return the text that was held back, with U+FFFD for an incomplete character, and reset."""
        chunk = self._text[self._sent :]
        self._ids, self._old, self._text, self._sent = [], 0, "", 0
        return chunk

    def _drop(self, cut: int) -> None:
        """Remove the first `cut` ids, whose text was already returned, from the window."""
        held = len(self._text) - self._sent
        self._ids, self._old = self._ids[cut:], max(0, self._old - cut)
        self._text = self._decode(self._ids)
        self._sent = len(self._text) - held

    def _shorten(self) -> str:
        """Shorten a window in which characters stay incomplete, and return the malformed text that is let out."""
        held = len(self._text) - self._sent
        latest = len(self._ids) - _MAX_INCOMPLETE
        # The number of cuts to try is limited. If none fits, the window grows, but the search does not.
        for cut in range(latest, max(0, latest - _WINDOW), -1):
            tail = self._decode(self._ids[cut:])
            # After a cut inside a character, U+FFFD stands in front of text that is known and was already returned.
            known = tail.lstrip(_REPLACEMENT)
            if len(known) > held and self._text.endswith(known):
                self._drop(cut)
                return ""
            # No known text follows: the tokens before the cut have malformed text that no later token completes.
            end = len(self._text) - len(tail)
            if end >= self._sent and self._decode(self._ids[:cut]) + tail == self._text:
                chunk = self._text[self._sent : end]
                self._sent = end
                self._drop(cut)
                return chunk
        return ""


class StopScanner:
    """Finds stop strings in a stream of text chunks and returns only the text before the first one.

    The stop string that is complete first counts. If two end at the same place, the longer one counts. So the result
    does not depend on how the text is divided into chunks.

    Args:
        stops: a list of strings; the list may be empty, but no string may.

    Raises:
        RequestError: `stops` is not a list, or a stop string is empty or not a string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stop_strings(stops)
        self._held = ""
        self._stopped = False

    def copy(self) -> StopScanner:
        """Return a scanner that continues from here, independently of this one."""
        made = object.__new__(StopScanner)
        made.__dict__.update(self.__dict__)
        return made

    def push(self, chunk: str) -> tuple[str, bool]:
        """Add a chunk of text.

        Returns:
            The text that is certain, and whether a stop string was found. After a stop string the text is always empty.
        """
        if self._stopped:
            return "", True
        text = self._held + chunk
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held, self._stopped = "", True
            return text[: min(found)[1]], True
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        safe = len(text) - keep
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """End the stream: return the text that was held back because a stop string could have followed."""
        held, self._held = self._held, ""
        return held


def stop_strings(stops: Iterable[str]) -> tuple[str, ...]:
    """Return the stop strings as a tuple, which also an iterator gives only once.

    Raises:
        RequestError: `stops` is not a list, or a stop string is empty or not a string.
    """
    if isinstance(stops, str | bytes | Mapping) or not isinstance(stops, Iterable):
        raise RequestError(
            "the value is not a list of strings", field="stop", got=shown(stops), wanted="a list of strings"
        )
    strings = tuple(stops)
    for i, stop in enumerate(strings):
        if not isinstance(stop, str) or not stop:
            raise RequestError(
                "the stop string is empty or not a string",
                field=f"stop[{i}]",
                got=shown(stop),
                wanted="a non-empty str",
            )
    return strings


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`, but not the whole of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
