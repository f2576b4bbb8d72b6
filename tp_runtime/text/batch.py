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
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Unpack

from ..errors import RequestError
from ..generation import PREFILL_TOKENS, Batch, PrefixCache, Row, check_request
from ..loaded_patches import LoadedPatches
from ..session import Graph
from .codec import Message, TextCodec
from .request import EncodedRequest, Request, RequestOptions, encode_request
from .stream import StoppingDecoder


class Completion:
    """One completion of a batch; it grows with `TextBatch.step`.

    Attributes:
        prompt_tokens: the number of tokens of the prompt.
        text: the text so far; it never ends within a character.
        token_ids: the ids so far, including the end-of-sequence id.
        seconds_to_first_token: the seconds from `add` to the first id, including the time spent waiting; None before.
        seconds: the seconds from `add` to the last id.
        finish_reason: "eos", "stop", "length", "closed" or "error" after the end of the completion; None before.
        error: the exception that ended the completion, if `finish_reason` is "error"; otherwise None.
    """

    def __init__(self, batch: TextBatch, request: EncodedRequest, decoder: StoppingDecoder, using: ExitStack) -> None:
        self.prompt_tokens = len(request.tokens)
        self.text = ""
        self.token_ids: list[int] = []
        self.seconds_to_first_token: float | None = None
        self.seconds = 0.0
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self._batch, self._request, self._decoder, self._using = batch, request, decoder, using
        self._start = time.perf_counter()
        self._row: Row | None = None

    def close(self) -> None:
        """Stop the completion early, free its row, and release its patch. After the end this has no effect."""
        self._batch._end(self, "closed")


class TextBatch:
    """Completions that run together. At most `rows` run at the same time; the others wait and join in order of arrival.

    Several threads may add, close and step at the same time. Each call waits for the running step.

    Args:
        graph: the graph that runs the steps.
        codec: the tokenizer and the chat template.
        patches: the loaded patches, from which requests take theirs.
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
        codec: TextCodec,
        patches: LoadedPatches,
        rows: int,
        prefix_cache: PrefixCache | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        self._graph, self._codec, self._patches = graph, codec, patches
        self._batch = Batch(graph, rows, prefix_cache, prefill_tokens)
        self._waiting: deque[Completion] = deque()
        self._running: dict[Row, Completion] = {}
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
        request = encode_request(Request.of(prompt, **options), self._codec, self._patches)
        check_request(self._graph.folder, request.tokens, request.patch.bound, request.max_new_tokens)
        self._graph.folder.check_ids(request.tokens)
        with self._lock:
            if self._closed:
                raise RequestError("the batch is closed", field="batch", fix="make another with model.batch()")
            using = ExitStack()
            using.enter_context(self._patches.using(request.patch.loaded))
            completion = Completion(self, request, StoppingDecoder(self._codec, request.scanner), using)
            self._waiting.append(completion)
            return completion

    def step(self) -> list[tuple[Completion, str]]:
        """Fill free rows with waiting completions, run their prompts or a chunk of them, then one token for every row.

        Returns:
            The completions that advanced or ended, each with its new text, which may be empty. If a completion ended,
            its `finish_reason` is set. The list is empty when no completion is left.
        """
        with self._lock:
            self._fill()
            new_tokens = self._batch.step()
            advanced = []
            for row, completion in list(self._running.items()):
                if row.error is not None:
                    completion.error = row.error
                    self._end(completion, "error")
                    advanced.append((completion, ""))
            for row, token in new_tokens:
                completion = self._running[row]
                advanced.append((completion, self._take(completion, row, token)))
            return advanced

    def close(self) -> None:
        """Stop all running and waiting completions, and accept no more."""
        with self._lock:
            self._closed = True
            for completion in (*self._running.values(), *self._waiting):
                self._end(completion, "closed")

    def __enter__(self) -> TextBatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- completions -----------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Let waiting completions join while rows are free."""
        while self._waiting and self._batch.free:
            completion = self._waiting.popleft()
            request = completion._request
            row = self._batch.join(
                request.tokens,
                request.patch.bound,
                sampling=request.sampling,
                max_new_tokens=request.max_new_tokens,
                eos_ids=self._codec.eos_ids,
            )
            completion._row, self._running[row] = row, completion

    def _take(self, completion: Completion, row: Row, token: int) -> str:
        completion.seconds = time.perf_counter() - completion._start
        if completion.seconds_to_first_token is None:
            completion.seconds_to_first_token = completion.seconds
        completion.token_ids.append(token)
        decoder = completion._decoder
        text = decoder.push(token)
        if row.finish_reason and not decoder.finish_reason:
            text += decoder.end(row.finish_reason)
        completion.text += text
        if decoder.finish_reason:
            self._end(completion, decoder.finish_reason)
        return text

    def _end(self, completion: Completion, reason: str) -> None:
        with self._lock:
            if completion.finish_reason is not None:
                return
            completion.finish_reason = reason
            if completion._row is None:
                self._waiting.remove(completion)
            else:
                self._batch.leave(completion._row)
                del self._running[completion._row]
            completion._using.close()
