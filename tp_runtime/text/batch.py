"""A running batch of texts: completions under different patches that step together, join and leave at any time.

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
        prompt_tokens: tokens of the prompt.
        text: so far; it never ends within a character.
        token_ids: so far, the end-of-sequence id included.
        seconds_to_first_token: from `add` to the first id, the time spent waiting included; None before.
        seconds: from `add` to the last id.
        finish_reason: "eos", "stop", "length", "closed" or "error" once it is over, None before.
        error: what ended it; only with "error".
    """

    def __init__(self, batch: TextBatch, request: EncodedRequest, pieces: StoppingDecoder, using: ExitStack) -> None:
        self.prompt_tokens = len(request.tokens)
        self.text = ""
        self.token_ids: list[int] = []
        self.seconds_to_first_token: float | None = None
        self.seconds = 0.0
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self._batch, self._request, self._pieces, self._using = batch, request, pieces, using
        self._start = time.perf_counter()
        self._row: Row | None = None

    def close(self) -> None:
        """Stop early, make room, and release the patch; nothing where it is over already."""
        self._batch._end(self, "closed")


class TextBatch:
    """Completions that run together, at most `rows` at once; the others wait their turn, first come first served.

    Threads may add, close and step at once; each waits for the step that runs.

    Args:
        graph: runs the steps.
        codec: the tokenizer and chat template.
        patches: where requests find their patches.
        rows: at most this many completions run at once.
        prefix_cache: where prompts find what was run before; None runs each from its start.
        prefill_tokens: of prompts, run between two tokens of the completions that wait for theirs.

    Raises:
        RequestError: `rows` or `prefill_tokens` is no number of them.
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
        """Let a completion take part from the next step on, or as soon as there is room.

        Args:
            prompt: one user message, or a list of messages; see Request.
            options: see Request; a batch keeps caches of its own, so there is no `cache`. A patch that is named
                cannot be unloaded until the completion is over.

        Raises:
            RequestError: a prompt or a value that cannot be served, or the batch is closed. The batch is as it was.
            PatchError: the patch is not loaded or does not fit. The batch is as it was.
        """
        if "cache" in options:
            raise RequestError(
                "a batch keeps caches of its own", field="cache", got="a cache", fix="leave it out, or use stream"
            )
        request = encode_request(Request.of(prompt, **options), self._codec, self._patches)
        check_request(self._graph.folder, request.tokens, request.patch.bound, request.max_new_tokens)
        self._graph.check_ids(request.tokens)
        with self._lock:
            if self._closed:
                raise RequestError("the batch is closed", field="batch", fix="make another with model.batch()")
            using = ExitStack()
            using.enter_context(self._patches.using(request.patch.loaded))
            completion = Completion(self, request, StoppingDecoder(self._codec, request.scanner), using)
            self._waiting.append(completion)
            return completion

    def step(self) -> list[tuple[Completion, str]]:
        """Fill free rows with those that wait, run their prompts or a piece of them, then one token for every row.

        Returns:
            The completions that moved, each with its new text, which may be empty; what has ended says why. Nothing
            when none is left.
        """
        with self._lock:
            self._fill()
            handed = self._batch.step()
            moved = []
            for row, completion in list(self._running.items()):
                if row.error is not None:
                    completion.error = row.error
                    self._end(completion, "error")
                    moved.append((completion, ""))
            for row, token in handed:
                completion = self._running[row]
                moved.append((completion, self._take(completion, row, token)))
            return moved

    def close(self) -> None:
        """Stop everything that runs or waits, and take nothing more."""
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
        """Let those that wait join while there is room."""
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
        pieces = completion._pieces
        text = pieces.push(token)
        if row.finish_reason and not pieces.finish_reason:
            text += pieces.end(row.finish_reason)
        completion.text += text
        if pieces.finish_reason:
            self._end(completion, pieces.finish_reason)
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
