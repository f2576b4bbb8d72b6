"""A running batch of texts: completions under different patches step together, and join and leave at any time.

with model.batch(rows=8) as batch:
    one = batch.add("How do I learn to swim?", patch="pirate")
    two = batch.add("How far is the moon?", patch="support", strength=0.5, temperature=0.7, seed=1)
    while batch.step():
        ...
print(one.text, two.text)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import cached_property
from types import TracebackType
from typing import NamedTuple, Unpack

from ..errors import RequestError
from ..generation import PREFILL_TOKENS, Batch, PrefixCache, Row, check_request
from ..session import Graph, Use
from .answer import AnswerReader
from .codec import Message
from .encoder import EncodedRequest, RequestEncoder
from .request import Request, RequestOptions
from .result import Result, Timings, TokenInfo, Usage, result_of, token_infos
from .stream import StoppingDecoder


class _Progress(NamedTuple):
    """How far a completion is. Each step replaces it as a whole, so a step that fails leaves none half changed.

    Attributes:
        decoder: the decoder after the ids taken so far; it is never changed, only copied.
        ids: the number of ids taken so far.
        text, seconds_to_first_token, seconds, finish_reason, error: see Completion.
    """

    decoder: StoppingDecoder
    ids: int = 0
    text: str = ""
    seconds_to_first_token: float | None = None
    seconds: float = 0.0
    finish_reason: str | None = None
    error: Exception | None = None


class Completion:
    """One completion of a batch; it grows with `TextBatch.step`.

    Attributes:
        prompt_tokens: the number of tokens of the prompt.
    """

    def __init__(self, batch: TextBatch, request: EncodedRequest, decoder: StoppingDecoder) -> None:
        self.prompt_tokens = len(request.tokens)
        self._batch, self._request = batch, request
        loaded = request.patch.loaded
        # A context manager would not do: an interrupt within its exit could keep the patch in use.
        self._use = None if loaded is None else Use(loaded.uses)
        self._start = time.perf_counter()
        self._row: Row | None = None
        self._failure: Exception | None = None  # the error that kept it from joining
        self._progress = _Progress(decoder)

    @property
    def text(self) -> str:
        """The text so far; it never ends within a character."""
        return self._progress.text

    def new_reader(self) -> AnswerReader | None:
        """Return a reader that tells reasoning, text and calls of tools apart in this completion's text.

        It begins at the start of the text. It is None if everything is text.
        """
        return None if self._request.reader is None else self._request.reader.copy()

    def token_infos(self, start: int) -> tuple[TokenInfo, ...]:
        """Return the log-probabilities of the ids from number `start` on; empty unless the request wants them."""
        sampler = self._request.sampler
        return token_infos(sampler.logprobs[start : self._progress.ids], self._batch._codec) if sampler.records else ()

    @cached_property  # the ids of its tool calls are drawn
    def result(self) -> Result:
        """The result of the completion.

        Raises:
            RequestError: the completion has not ended, or it ended with an error.
        """
        progress = self._progress
        if progress.finish_reason is None or progress.error is not None:
            raise RequestError(
                "the completion has no result",
                field="completion",
                got="a completion that has not ended" if progress.error is None else "a completion that failed",
                fix="step until it has a finish_reason" if progress.error is None else "see its `error`",
            )
        ids = self.token_ids
        timings = Timings(progress.seconds_to_first_token, progress.seconds, len(ids))
        usage = Usage(self.prompt_tokens, len(ids))
        return result_of(self._request, self._batch._codec, progress.text, ids, progress.finish_reason, usage, timings)

    @property
    def token_ids(self) -> list[int]:
        """The ids so far, including the end-of-sequence id."""
        return [] if self._row is None else self._row.tokens[self.prompt_tokens :][: self._progress.ids]

    @property
    def seconds_to_first_token(self) -> float | None:
        """The seconds from `add` to the first id, including the time spent waiting; None before."""
        return self._progress.seconds_to_first_token

    @property
    def seconds(self) -> float:
        """The seconds from `add` to the last id."""
        return self._progress.seconds

    @property
    def finish_reason(self) -> str | None:
        """Why the completion ended: "eos", "stop", "length", "closed" or "error"; None before the end."""
        return self._progress.finish_reason

    @property
    def error(self) -> Exception | None:
        """The exception that ended the completion, if `finish_reason` is "error"; otherwise None."""
        return self._progress.error

    def close(self) -> None:
        """Stop the completion early, free its row, and release its patch. After the end this has no effect."""
        self._batch._close(self)

    def _advanced(self) -> _Progress:
        """Return the progress after the ids that the row got; the same object if it got none and has not ended.

        The completion does not wait. An error of the row or of the decoder ends it.
        """
        row, progress = self._row, self._progress
        if progress.finish_reason is not None:
            return progress
        if row is None:
            return progress._replace(finish_reason="error", error=self._failure)
        if row.finish_reason == "error":
            return progress._replace(finish_reason="error", error=row.error)
        ids = row.tokens[self.prompt_tokens + progress.ids :]
        if not ids and row.finish_reason is None:
            return progress
        decoder, text, seconds = progress.decoder.copy(), progress.text, time.perf_counter() - self._start
        taken = progress.ids
        try:
            for token in ids:
                text += decoder.push(token)
                taken += 1
                if decoder.finish_reason:
                    break
            if row.finish_reason and not decoder.finish_reason:
                text += decoder.end(row.finish_reason)
        except Exception as error:
            return progress._replace(finish_reason="error", error=error)
        first = seconds if progress.seconds_to_first_token is None else progress.seconds_to_first_token
        return _Progress(decoder, taken, text, first, seconds, decoder.finish_reason)


_Advance = tuple[Completion, _Progress, _Progress]  # a completion, and its progress before and after a step


class TextBatch:
    """Completions that run together. At most `rows` run at the same time; the others wait and join in order of arrival.

    Several threads may add, close and step at the same time. Each call waits for the running step.

    Args:
        graph: the graph that runs the steps.
        encoder: encodes the requests; it has the tokenizer and the loaded patches.
        rows: the largest number of completions that run at the same time.
        prefix_cache: the cache from which prompts take the keys and values of earlier runs. With None every prompt is
            run from its start.
        prefill_tokens: the largest number of prompt tokens to run between two tokens of the running completions.

    Raises:
        RequestError: `rows` or `prefill_tokens` is not a positive integer.
    """

    def __init__(
        self,
        graph: Graph,
        encoder: RequestEncoder,
        rows: int,
        prefix_cache: PrefixCache | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        self._graph, self._encoder, self._codec = graph, encoder, encoder.codec
        self._batch = Batch(graph, rows, prefix_cache, prefill_tokens)
        # All completions that have not ended, in order of arrival: first those with a row, then those that wait.
        self._completions: list[Completion] = []
        # What a step found: the completions that advanced, each before and after it; None between the steps.
        self._taken: list[_Advance] | None = None
        self._failed = False  # whether the last step may have failed; True while one runs, and after `close`
        self._lock = threading.RLock()
        self._closed = False

    def add(self, prompt: str | Sequence[Message], **options: Unpack[RequestOptions]) -> Completion:
        """Add a completion, which takes part from the next step on, or as soon as a row is free.

        If this raises, the batch is unchanged.

        Args:
            prompt: one user message, or a list of messages; see Request.
            options: the options of Request. There is no `cache`, because a batch has its own caches. A patch that is
                named here cannot be unloaded until the completion is over.

        Raises:
            RequestError: the prompt or an option is not valid, or the batch is closed.
            PatchError: the patch is not loaded or does not fit.
        """
        if "cache" in options:
            raise RequestError(
                "a batch has its own caches and does not accept a cache",
                field="cache",
                got="a cache",
                fix="leave it out, or use stream",
            )
        request = self._encoder.encode(Request.of(prompt, **options))
        check_request(self._graph.folder, request.tokens, request.patch.bound, request.max_new_tokens)
        self._graph.folder.check_ids(request.tokens)
        completion = Completion(self, request, StoppingDecoder(self._codec, request))
        try:
            with self._lock:
                if self._closed:
                    raise RequestError("the batch is closed", field="batch", fix="make another with model.batch()")
                if request.patch.loaded is not None and completion._use is not None:
                    self._encoder.patches.begin(completion._use, request.patch.loaded)
                self._completions.append(completion)
                return completion
        except BaseException:
            self._close(completion)  # the caller has not got it
            raise

    def step(self) -> list[tuple[Completion, str]]:
        """Fill free rows with waiting completions, run their prompts or a chunk of them, then one token for every row.

        If this raises, it may be tried again: what was not returned is returned by the next calls.

        Returns:
            The completions that advanced or ended, each with its new text, which may be empty. If a completion ended,
            its `finish_reason` is set. The list is empty when no completion is left.
        """
        taken: list[_Advance] = []
        try:
            with self._lock:
                try:
                    if not self._taken:
                        self._taken = self._next()
                    self._settle()
                    taken = self._taken
                    out = [(completion, after.text[len(before.text) :]) for completion, before, after in taken]
                    self._failed, self._taken = False, None
                    return out
                except BaseException:
                    if taken:  # the caller has not got them; another thread may step as soon as the lock is free
                        self._taken, taken = taken, []
                    raise
        except BaseException:
            if taken:  # an interrupt arrived while the lock was released
                with self._lock:
                    self._taken = [*taken, *(self._taken or ())]
            raise

    def close(self) -> None:
        """Stop all running and waiting completions, and accept no more."""
        with self._lock:
            self._closed = True
            for completion in list(self._completions):
                self._close(completion)

    def __enter__(self) -> TextBatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- completions -----------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Let waiting completions join while rows are free."""
        joined = self._joined()
        if len(joined) == len(self._completions):
            return
        place = len(joined)
        while place < len(self._completions) and self._batch.free:
            completion = self._completions[place]
            if completion.finish_reason is not None:
                self._release(completion)  # closing it failed
                continue
            request = completion._request
            try:
                completion._row = self._batch.join(
                    request.tokens,
                    request.patch.bound,
                    sampler=request.sampler,
                    max_new_tokens=request.max_new_tokens,
                    eos_ids=self._codec.eos_ids,
                )
            except Exception as error:  # the error belongs to this completion; the others continue
                completion._failure = error
            place += 1

    def _joined(self) -> list[Completion]:
        """Return the completions that do not wait for a row."""
        joined = []
        for completion in self._completions:
            if completion._row is None and completion._failure is None:
                break
            joined.append(completion)
        return joined

    def _next(self) -> list[_Advance]:
        """Step the rows until a completion advances or none is left."""
        taken = []
        if self._failed:
            taken = self._take()  # the step that failed may have given its rows their ids
            known = {completion._row for completion in self._joined()}
            for row in (*self._batch.rows, *self._batch.joining):
                if row not in known:  # a call failed between the row and its completion
                    self._batch.leave(row)
        self._failed = True
        while not taken:
            self._fill()
            stepped = self._batch.step()
            taken = self._take()
            if not stepped:
                break
        return taken

    def _take(self) -> list[_Advance]:
        """Return the completions whose rows advanced, each with its progress before and after. This changes nothing."""
        found = [(completion, completion._progress, completion._advanced()) for completion in self._joined()]
        return [(completion, before, after) for completion, before, after in found if after is not before]

    def _settle(self) -> None:
        """Finish what an earlier call began: store the progress that was found, and release what has ended."""
        for completion, before, after in self._taken or ():
            if completion._progress is before:
                completion._progress = after
        for completion in self._joined():
            if completion._progress.finish_reason is not None:
                self._release(completion)

    def _close(self, completion: Completion) -> None:
        with self._lock:
            self._failed = True  # this call may fail below
            self._settle()
            if completion.finish_reason is None:
                completion._progress = completion._progress._replace(finish_reason="closed")
            self._release(completion)

    def _release(self, completion: Completion) -> None:
        """Free the row and the patch of a completion that has ended."""
        try:
            if completion._row is not None:
                self._batch.leave(completion._row)
        finally:
            if completion._use is not None:
                completion._use.end()
            if completion in self._completions:
                self._completions.remove(completion)
