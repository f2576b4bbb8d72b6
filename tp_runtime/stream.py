"""A running completion as pieces of text: decoding, stop strings, and the figures of one request."""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager

from .detokenize import IncrementalDecoder, StopScanner
from .text import TextCodec


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
        self._pieces = _run(weakref.proxy(self), ids, codec, scanner, using)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop early and release the patch."""
        self._pieces.close()


def _run(
    stream: TextStream,
    ids: Iterator[int],
    codec: TextCodec,
    scanner: StopScanner,
    using: AbstractContextManager[None],
) -> Generator[str]:
    """The pieces of `stream`, whose figures are kept up to date on the way."""
    decoder = IncrementalDecoder(codec.decode)
    start = time.perf_counter()
    with using:
        for token in ids:
            stream.seconds = time.perf_counter() - start
            if stream.seconds_to_first_token is None:
                stream.seconds_to_first_token = stream.seconds
            stream.token_ids.append(token)
            if token in codec.eos_ids:
                stream.finish_reason = "eos"
                break
            text, stopped = scanner.push(decoder.push(token))
            if text:
                yield text
            if stopped:
                stream.finish_reason = "stop"
                return
    text, stopped = scanner.push(decoder.flush())
    rest = text if stopped else text + scanner.flush()
    if stopped:
        stream.finish_reason = "stop"
    stream.finish_reason = stream.finish_reason or "length"
    if rest:
        yield rest
