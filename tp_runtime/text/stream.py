"""A running completion as pieces of text: decoding, stop strings, and the figures of one request."""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager

from .codec import TextCodec
from .detokenize import IncrementalDecoder, StopScanner


class TextStream:
    """A running completion: an iterator over pieces of text that never split a character.

    Attributes:
        prompt_tokens: tokens of the prompt.
        token_ids: ids produced so far, the end-of-sequence id included.
        seconds_to_first_token: from the first `next` to the first id; None before.
        seconds: from the first `next` to the last id.
        finish_reason: "eos", "stop" or "length" once it is over, None before.
    """

    def __init__(
        self,
        ids: Iterator[int],
        codec: TextCodec,
        scanner: StopScanner,
        prompt_tokens: int,
        using: AbstractContextManager[None],
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.token_ids: list[int] = []
        self.seconds_to_first_token: float | None = None
        self.seconds = 0.0
        self.finish_reason: str | None = None
        # A weak reference: with a strong one a stream that is dropped midway would hold its patch until a collection.
        self._pieces = _run(weakref.proxy(self), ids, StoppingDecoder(codec, scanner), using)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop early and release the patch."""
        self._pieces.close()


class StoppingDecoder:
    """The text of one completion, id by id, and how it ended.

    Attributes:
        finish_reason: "eos", "stop", or what `end` was told; None before.
    """

    def __init__(self, codec: TextCodec, scanner: StopScanner) -> None:
        self.finish_reason: str | None = None
        self._eos_ids, self._scanner = codec.eos_ids, scanner
        self._decoder = IncrementalDecoder(codec.decode)

    def push(self, token: int) -> str:
        """Take one id; returns the text that it makes certain, with all that was held back if it ends the text."""
        if token in self._eos_ids:
            return self.end("eos")
        text, stopped = self._scanner.push(self._decoder.push(token))
        if stopped:
            self.finish_reason = "stop"
        return text

    def end(self, reason: str) -> str:
        """End the text; returns what was held back."""
        text, stopped = self._scanner.push(self._decoder.flush())
        self.finish_reason = "stop" if stopped else reason
        return text if stopped else text + self._scanner.flush()


def _run(
    stream: TextStream, ids: Iterator[int], pieces: StoppingDecoder, using: AbstractContextManager[None]
) -> Generator[str]:
    """The pieces of `stream`, whose figures are kept up to date on the way."""
    start = time.perf_counter()
    with using:
        for token in ids:
            stream.seconds = time.perf_counter() - start
            if stream.seconds_to_first_token is None:
                stream.seconds_to_first_token = stream.seconds
            stream.token_ids.append(token)
            text = pieces.push(token)
            if pieces.finish_reason:
                break
            if text:
                yield text
        else:
            text = pieces.end("length")
    stream.finish_reason = pieces.finish_reason
    if text:
        yield text
