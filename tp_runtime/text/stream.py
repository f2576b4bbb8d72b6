"""A running completion as a stream of text chunks, with decoding, stop strings, and the figures of one request."""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager

from .codec import TextCodec
from .detokenize import IncrementalDecoder, StopScanner


class TextStream:
    """A running completion: an iterator over chunks of text that never split a character.

    Attributes:
        prompt_tokens: the number of tokens of the prompt.
        token_ids: the ids produced so far, including the end-of-sequence id.
        seconds_to_first_token: the seconds from the first `next` to the first id; None before.
        seconds: the seconds from the first `next` to the last id.
        finish_reason: "eos", "stop" or "length" after the end of the completion; None before.
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
        # The reference is weak: with a strong one, a stream that is dropped before its end would keep its patch in use
        # until the next garbage collection.
        self._chunks = _run(weakref.proxy(self), ids, StoppingDecoder(codec, scanner), using)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._chunks)

    def close(self) -> None:
        """Stop the completion early and release the patch."""
        self._chunks.close()


class StoppingDecoder:
    """Decodes the text of one completion id by id, up to its end.

    Attributes:
        finish_reason: "eos", "stop", or the reason passed to `end`; None before the end.
    """

    def __init__(self, codec: TextCodec, scanner: StopScanner) -> None:
        self.finish_reason: str | None = None
        self._eos_ids, self._scanner = codec.eos_ids, scanner
        self._decoder = IncrementalDecoder(codec.decode)

    def copy(self) -> StoppingDecoder:
        """Return a decoder that continues from here, independently of this one."""
        made = object.__new__(StoppingDecoder)
        made.__dict__.update(self.__dict__)
        made._scanner, made._decoder = self._scanner.copy(), self._decoder.copy()
        return made

    def push(self, token: int) -> str:
        """Add one id and return the text that becomes certain; at the end also the text that was held back."""
        if token in self._eos_ids:
            return self.end("eos")
        text, stopped = self._scanner.push(self._decoder.push(token))
        if stopped:
            self.finish_reason = "stop"
        return text

    def end(self, reason: str) -> str:
        """End the text and return the part that was held back."""
        text, stopped = self._scanner.push(self._decoder.flush())
        self.finish_reason = "stop" if stopped else reason
        return text if stopped else text + self._scanner.flush()


def _run(
    stream: TextStream, ids: Iterator[int], decoder: StoppingDecoder, using: AbstractContextManager[None]
) -> Generator[str]:
    """Yield the chunks of `stream` and update its figures."""
    start = time.perf_counter()
    with using:
        for token in ids:
            stream.seconds = time.perf_counter() - start
            if stream.seconds_to_first_token is None:
                stream.seconds_to_first_token = stream.seconds
            stream.token_ids.append(token)
            text = decoder.push(token)
            if decoder.finish_reason:
                break
            if text:
                yield text
        else:
            text = decoder.end("length")
    stream.finish_reason = decoder.finish_reason
    if text:
        yield text
