"""Token ids to text, one token at a time, and stop strings in the stream.

Both hold text back until it is certain: the decoder while a character is incomplete, the scanner while a stop
string could still begin. Neither knows what produced the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import RequestError

_REPLACEMENT = "\ufffd"
_MAX_INCOMPLETE = 3  # bytes, and so at most tokens, of a UTF-8 character that is not complete
_WINDOW = 16  # ids decoded together before malformed text is given up on; well-formed text takes far fewer


class IncrementalDecoder:
    """Decodes a stream of token ids into pieces that never split a character.

    The pieces together are `decode(all ids)`. It decodes a short window: the tokens of the last piece, whose
    text is already out, and the new ones. The old ones are there because decoders treat the first token apart
    (SentencePiece drops its space) and because a run of byte tokens is decoded as one.

    One exception: `tokenizers` turns a whole run of byte-fallback tokens into U+FFFD if any byte in it
    is malformed, also characters before that byte, which are already out by then. Such a text differs
    within that run: in which of its characters, and how many, are U+FFFD. What is around it is the same.

    Args:
        decode: token ids to text, such as `TextCodec.decode`.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the window
        self._old = 0  # how many ids of the window belong to pieces already out
        self._text = ""  # decode(window)
        self._sent = 0  # characters of it already out

    def push(self, token_id: int) -> str:
        """Takes one token; returns the text that it makes certain, which may be empty.

        The cost does not depend on how many tokens came before.
        """
        self._ids.append(token_id)
        text = self._decode(self._ids)
        # U+FFFD at the end may be the beginning of a character.
        certain = len(text.rstrip(_REPLACEMENT))
        if text and text == self._text and certain == len(text):
            # A token without text (a skipped special one) must not become the window's first: what follows it
            # would then be treated as the start of a text.
            self._ids.pop()
            return ""
        self._text = text
        piece = text[self._sent : certain]
        self._sent = max(self._sent, certain)
        if piece and certain == len(text):
            self._drop(self._old)
            self._old = len(self._ids)
        elif len(self._ids) % _WINDOW == 0:
            piece += self._shorten()
        return piece

    def flush(self) -> str:
        """Ends the stream: returns what was held back, an incomplete character as U+FFFD, and starts anew."""
        piece = self._text[self._sent :]
        self._ids, self._old, self._text, self._sent = [], 0, "", 0
        return piece

    def _drop(self, cut: int) -> None:
        """Takes the first `cut` ids, whose text is out, from the window."""
        held = len(self._text) - self._sent
        self._ids, self._old = self._ids[cut:], max(0, self._old - cut)
        self._text = self._decode(self._ids)
        self._sent = len(self._text) - held

    def _shorten(self) -> str:
        """Cuts a window in which characters stay incomplete; returns the malformed text given up on."""
        held = len(self._text) - self._sent
        latest = len(self._ids) - _MAX_INCOMPLETE
        # Only so many cuts are tried: where none fits, the window grows, but the search does not.
        for cut in range(latest, max(0, latest - _WINDOW), -1):
            tail = self._decode(self._ids[cut:])
            # A cut inside a character leaves U+FFFD in front of text that is known, and out, already.
            known = tail.lstrip(_REPLACEMENT)
            if len(known) > held and self._text.endswith(known):
                self._drop(cut)
                return ""
            # Nothing known: the tokens before the cut have malformed text that nothing after it completes.
            end = len(self._text) - len(tail)
            if end >= self._sent and self._decode(self._ids[:cut]) + tail == self._text:
                piece = self._text[self._sent : end]
                self._sent = end
                self._drop(cut)
                return piece
        return ""


class StopScanner:
    """Finds stop strings in a stream of text pieces and lets out only what precedes them.

    The stop string that is complete first counts; of two that end together, the longer. So the result does
    not depend on how the text is cut into pieces.

    Args:
        stops: strings, none empty; the list may be.

    Raises:
        RequestError: a stop string is empty or not a string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise RequestError("not a list", field="stop", got=repr(stops[:40]), wanted="a list of strings")
        for i, stop in enumerate(stops):
            if not isinstance(stop, str) or not stop:
                raise RequestError("not a stop string", field=f"stop[{i}]", got=repr(stop), wanted="non-empty str")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, piece: str) -> tuple[str, bool]:
        """Takes a piece of text.

        Returns:
            The text that is safe to let out, and whether a stop string was found; from then on the text is
            empty.
        """
        if self._stopped:
            return "", True
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held, self._stopped = "", True
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        safe = len(text) - keep
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """Ends the stream: returns what was held back in case a stop string came."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, short of all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
