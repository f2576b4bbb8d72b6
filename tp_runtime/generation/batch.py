"""A running batch on token ids: its sequences step together under different patches, and join and leave between steps.

Like engine.py, this module does not handle text, files or names. Apart from rounding, the output of a sequence does not
depend on the other sequences in the batch: its prompt is run separately, and it has its own patch, lengths, positions
and sampler. A long prompt does not stop the others either: while they run, each step runs one chunk of the prompt and
then their next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import ModelFormatError, RequestError, require_positive
from ..session import BoundPatch, Graph, KVCache
from .engine import check_request
from .prefix_cache import PrefixCache
from .rows import new_rows
from .sampling import Sampler, Sampling, pick_rows

PREFILL_TOKENS = (
    32  # with chunks of this size a CPU takes hardly longer for a prompt than with the whole prompt at once
)


@dataclass(eq=False)
class Row:
    """One sequence of a batch.

    Attributes:
        tokens: the ids of the prompt and of the completion so far; the last id has not been run yet.
        prompt_tokens: the number of ids of the prompt.
        bound: the patch that the sequence runs under.
        token_limit: the number of ids, prompt included, at which the sequence ends.
        eos_ids: the ids that end the sequence.
        sampler: the sampler that picks the sequence's ids.
        cache: the KV cache of the ids that have been run.
        started: whether a part of the prompt has been run or looked up in the prefix cache.
        finish_reason: "eos", "length", "left" or "error" after the sequence has left the batch; None before.
        error: the exception that stopped the prompt's run or the choice of a token, if the reason is "error"; otherwise
            None.
    """

    tokens: list[int]
    prompt_tokens: int
    bound: BoundPatch
    token_limit: int
    eos_ids: frozenset[int]
    sampler: Sampler
    cache: KVCache
    started: bool = field(default=False, init=False)
    finish_reason: str | None = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)


class Batch:
    """Sequences that run over one graph. Only one thread at a time may use a batch.

    Args:
        graph: the graph that runs the steps.
        rows: the largest number of sequences at the same time.
        prefix_cache: the cache from which prompts take keys and values of earlier runs, and which stores theirs.
        prefill_tokens: the number of prompt tokens to run between two tokens of the running rows.

    Raises:
        RequestError: `rows` or `prefill_tokens` is not a positive integer.
    """

    def __init__(
        self, graph: Graph, rows: int, prefix_cache: PrefixCache | None = None, prefill_tokens: int = PREFILL_TOKENS
    ) -> None:
        require_positive("rows", rows)
        require_positive("prefill_tokens", prefill_tokens)
        self._graph, self._limit, self._prefix_cache = graph, rows, prefix_cache
        self._prefill_tokens = prefill_tokens
        self._joining: list[Row] = []  # the rows whose prompts have not been run to their end
        self._running: list[Row] = []  # the running rows, in the order of the graph's rows
        self._rows = new_rows(graph, rows)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The sequences that are running."""
        return tuple(self._running)

    @property
    def joining(self) -> tuple[Row, ...]:
        """The sequences whose prompts have not been run to their end."""
        return tuple(self._joining)

    @property
    def free(self) -> int:
        """The number of sequences that may still join."""
        return self._limit - len(self._running) - len(self._joining)

    def join(
        self,
        prompt: Sequence[int],
        bound: BoundPatch,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        eos_ids: frozenset[int],
    ) -> Row:
        """Add a sequence to the batch. It runs with the others once steps have run its prompt up to the last id.

        Args:
            prompt: the ids of the prompt, at least one.
            bound: the patch for every step of this sequence.
            sampling: the settings for picking its ids.
            max_new_tokens: the largest number of new tokens, at least 1.
            eos_ids: the ids that end the sequence.

        Returns:
            The row of the sequence.

        Raises:
            RequestError: `engine.generate` would refuse the request, an id is outside the vocabulary, or the batch is
                full. The batch stays as it was.
        """
        token_limit = check_request(self._graph.folder, prompt, bound, max_new_tokens)
        self._graph.folder.check_ids(prompt)
        if not self.free:
            raise RequestError(
                "the batch is full",
                field="rows",
                got=f"{self._limit} sequences",
                wanted=f"fewer than {self._limit} sequences",
                fix="step until a sequence ends, make one leave, or create the batch with more rows",
            )
        cache = self._graph.new_cache(bound)
        row = Row(list(prompt), len(prompt), bound, token_limit, eos_ids, Sampler(sampling), cache)
        self._joining.append(row)
        return row

    def step(self) -> list[tuple[Row, int]]:
        """Run one step of the batch.

        A row that ends with this step leaves the batch. A row whose prompt cannot be run, or whose logits are not
        finite, leaves with its error and gets no id. If the run of all rows fails, the rows stay as they were, and the
        step may be tried again.

        Returns:
            The new id of every running row, end-of-sequence ids included; empty if no row is running.
        """
        # 0. Run prompts: one chunk while rows wait for their next id, otherwise all prompts.
        self._run_prompts(self._prefill_tokens if self._running else None)
        rows = list(self._running)
        if not rows:
            return []
        # 1. Run the last id of every row, together.
        logits = self._rows.step([row.tokens[-1] for row in rows])
        # 2. Pick a token for each row, with its own sampler and its own ids.
        picked = pick_rows([row.sampler for row in rows], logits, [row.tokens for row in rows])
        # 3. Return the tokens; rows that have ended leave.
        out = []
        for row, token in zip(rows, picked, strict=True):
            if isinstance(token, ModelFormatError):
                row.error = token
                self._end(row, "error")
                continue
            row.tokens.append(token)
            out.append((row, token))
            if token in row.eos_ids:
                self._end(row, "eos")
            elif len(row.tokens) == row.token_limit:
                self._end(row, "length")
        return out

    def leave(self, row: Row) -> None:
        """Take a row out of the batch before it ends; a row that has ended already does not change."""
        if row in self._running:
            self._end(row, "left")
        elif row in self._joining:
            self._joining.remove(row)
            row.finish_reason = "left"

    def _run_prompts(self, most: int | None) -> None:
        """Run at most `most` ids of the joining rows' prompts, in the order of the rows; None runs all ids."""
        for row in list(self._joining):
            if most == 0:
                return
            try:
                ran = self._run_prompt(row, most)
            except Exception as error:  # the error belongs to this row; the other rows continue
                self._joining.remove(row)
                row.error, row.finish_reason = error, "error"
            else:
                most = None if most is None else most - ran

    def _run_prompt(self, row: Row, most: int | None) -> int:
        """Run at most `most` more ids of a row's prompt, without its last id; return the number of ids that were run.

        When all of these ids have been run, the row starts to run with the others.
        """
        cache, prompt = row.cache, row.tokens
        if self._prefix_cache is not None and not row.started:
            self._prefix_cache.fill(cache, prompt)
        row.started = True
        chunk = prompt[len(cache) : -1][:most]
        if chunk:
            self._graph.forward(chunk, cache, row.bound)
        if len(cache) == len(prompt) - 1:
            if chunk and self._prefix_cache is not None:
                self._prefix_cache.keep(cache, lambda: self._graph.content(cache))
            self._rows.add(cache, row.bound)
            self._joining.remove(row)
            self._running.append(row)
        return len(chunk)

    def _end(self, row: Row, reason: str) -> None:
        at = self._running.index(row)
        if self._prefix_cache is not None and reason != "error":
            self._prefix_cache.keep(row.cache, lambda: self._rows.content(at))
        self._rows.remove(at)
        self._running[at] = self._running[-1]
        del self._running[-1]
        row.finish_reason = reason
