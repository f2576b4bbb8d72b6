"""A running completion as a stream of text chunks, with decoding, stop strings, and the figures of one request."""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing
from functools import cached_property, partial
from inspect import GEN_CLOSED, getgeneratorstate
from types import TracebackType

from ..errors import BusyError, RequestError
from ..generation import LookupStats, PrefixCache, generate
from ..session import Graph, KVCache
from .codec import TextCodec
from .detokenize import IncrementalDecoder, StopScanner
from .encoder import EncodedRequest, RequestEncoder
from .request import Request
from .result import Result, Timings, Usage, result_of


class TextStream:
    """A running completion: an iterator over chunks of text that never split a character.

    One thread at a time may read a stream; any thread may close it at any time. In a `with` block the stream is closed
    at the end of the block.

    Attributes:
        prompt_tokens: the number of tokens of the prompt.
        token_ids: the ids produced so far, including the end-of-sequence id.
        seconds_to_first_token: the seconds from the first `next` to the first id; None before.
        seconds: the seconds from the first `next` to the last id.
        finish_reason: "eos", "stop", "length" or "closed" after the end of the completion; None before.
        closing: whether `close` was called.
    """

    def __init__(
        self,
        ids: Generator[int],
        codec: TextCodec,
        request: EncodedRequest,
        using: AbstractContextManager[None],
        stats: LookupStats,
    ) -> None:
        self.prompt_tokens = len(request.tokens)
        self._codec, self._request, self._stats = codec, request, stats
        self.token_ids: list[int] = []
        self.seconds_to_first_token: float | None = None
        self.seconds = 0.0
        self.finish_reason: str | None = None
        self.closing = False
        self._text = ""
        # The reference is weak: with a strong one, a stream that is dropped before its end would keep its patch in use
        # until the next garbage collection.
        self._chunks = _run(weakref.proxy(self), ids, StoppingDecoder(codec, request), using)

    @cached_property  # the ids of its tool calls are drawn
    def result(self) -> Result:
        """The result of the completion.

        Raises:
            RequestError: the completion has not ended.
        """
        if self.finish_reason is None:
            raise RequestError("the completion has not ended", field="stream", fix="read it to its end, or close it")
        timings = Timings(self.seconds_to_first_token, self.seconds, len(self.token_ids))
        usage = Usage(self.prompt_tokens, len(self.token_ids), self._stats.accepted)
        return result_of(self._request, self._codec, self._text, self.token_ids, self.finish_reason, usage, timings)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Return the next chunk.

        Raises:
            StopIteration: the completion has ended, or the stream was closed.
            BusyError: another thread is reading the stream, or this one is further up.
        """
        try:
            return next(self._chunks)
        except ValueError as error:
            if not _runs_elsewhere(error):
                raise
            raise BusyError(
                "the stream is being read already",
                field="stream",
                fix="read a stream in one thread at a time, or make one stream for each thread",
            ) from None
        finally:
            if self.closing:
                self._end()  # another thread could not close the stream while this one was reading

    def close(self) -> None:
        """Stop the completion early, and release its patch and its cache. After the end this has no effect.

        If the stream is being read at this moment, in another thread or further up in this one, close returns at once.
        The reading ends with the token that is being computed, which is discarded, and then releases everything.
        """
        self.closing = True
        self._end()

    def _end(self) -> None:
        goes_on = getgeneratorstate(self._chunks) != GEN_CLOSED
        try:
            self._chunks.close()
        except ValueError as error:
            if not _runs_elsewhere(error):
                raise
            return  # the thread that runs the completion ends it
        if goes_on and self.finish_reason is None:
            self.finish_reason = "closed"

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start_stream(
    graph: Graph, encoder: RequestEncoder, request: Request, cache: KVCache | None, prefix_cache: PrefixCache | None
) -> TextStream:
    """Start a completion, which runs when the stream is read.

    Args:
        graph: the graph that runs the steps.
        encoder: encodes the request.
        request: the request.
        cache: a KV cache with earlier text of the same conversation; None begins a new one.
        prefix_cache: the cache from which the prompt takes the keys and values of earlier runs.

    Raises:
        RequestError, PatchError, StaleCacheError, BusyError: see PatchedModel.stream.
    """
    encoded, stats = encoder.encode(request), LookupStats()
    ids = generate(
        graph,
        encoded.tokens,
        encoded.patch.bound,
        sampler=encoded.sampler,
        max_new_tokens=encoded.max_new_tokens,
        eos_ids=encoder.codec.eos_ids,
        cache=cache,
        prefix_cache=prefix_cache,
        lookup=encoded.lookup,
        stats=stats,
    )
    return TextStream(ids, encoder.codec, encoded, encoder.patches.using(encoded.patch.loaded), stats)


class StoppingDecoder:
    """Decodes the text of one completion id by id, up to its end.

    Attributes:
        finish_reason: "eos", "stop", or the reason passed to `end`; None before the end.
    """

    def __init__(self, codec: TextCodec, request: EncodedRequest) -> None:
        self.finish_reason: str | None = None
        self._eos_ids, self._scanner = codec.eos_ids, StopScanner(request.stop)
        # What tells reasoning and calls apart needs their markers, which can be special tokens.
        self._decoder = IncrementalDecoder(partial(codec.decode, keep_markers=request.reader is not None))

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
    stream: TextStream, ids: Generator[int], decoder: StoppingDecoder, using: AbstractContextManager[None]
) -> Generator[str]:
    """Yield the chunks of `stream` and update its figures."""
    start = time.perf_counter()
    with using, closing(ids):
        for token in ids:
            if stream.closing:
                stream.finish_reason = "closed"
                return
            stream.seconds = time.perf_counter() - start
            if stream.seconds_to_first_token is None:
                stream.seconds_to_first_token = stream.seconds
            stream.token_ids.append(token)
            text = decoder.push(token)
            stream._text += text
            if decoder.finish_reason:
                break
            if text:
                yield text
        else:
            text = decoder.end("length")
            stream._text += text
    stream.finish_reason = decoder.finish_reason
    if text:
        yield text


def _runs_elsewhere(error: ValueError) -> bool:
    """Return whether `error` says that the generator is executing already.

    That error comes from the call itself, so unlike an error from within the generator it has no deeper frame.
    """
    return error.__traceback__ is not None and error.__traceback__.tb_next is None
