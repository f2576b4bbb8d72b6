"""A running batch on token ids: its sequences step together under different patches, and join and leave between steps.

Like engine.py, this module does not handle text, files or names. Apart from rounding, the output of a sequence does not
depend on the other sequences in the batch: its prompt is run separately, and it has its own patch, lengths, positions
and sampler. A long prompt does not stop the others either: while they run, each step runs one chunk of the prompt and
then their next token.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import RequestError, require_positive
from ..session import BoundPatch, Graph, Use
from .engine import check_request
from .prefix_cache import PrefixCache
from .row import Row
from .rows import new_rows
from .sampler import Sampler, pick_rows

PREFILL_TOKENS = (
    32  # with chunks of this size a CPU takes hardly longer for a prompt than with the whole prompt at once
)


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
        # What a step picked for each row, and the number of the row's ids before it; None between the steps.
        self._picked: list[tuple[Row, int, int | Exception]] | None = None
        self._failed = False  # whether the last call failed; True while one runs

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
        return self._limit - len({*self._running, *self._joining})  # after a call that failed, a row may be in both

    def join(
        self,
        prompt: Sequence[int],
        bound: BoundPatch,
        *,
        sampler: Sampler,
        max_new_tokens: int,
        eos_ids: frozenset[int],
    ) -> Row:
        """Add a sequence to the batch. It runs with the others once steps have run its prompt up to the last id.

        Args:
            prompt: the ids of the prompt, at least one.
            bound: the patch for every step of this sequence.
            sampler: picks the ids of this sequence, and of no other.
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
        sampler.require_vocabulary(self._graph.folder.vocab_size)
        if self._failed:
            self._settle()
        if not self.free:
            raise RequestError(
                "the batch is full",
                field="rows",
                got=f"{self._limit} sequences",
                wanted=f"fewer than {self._limit} sequences",
                fix="step until a sequence ends, make one leave, or create the batch with more rows",
            )
        cache = self._graph.new_cache(bound)
        cache.batched = True
        held = Use(cache.uses)
        cache.take(held)
        row = Row(list(prompt), len(prompt), bound, token_limit, eos_ids, sampler, cache, held)
        try:
            self._joining.append(row)
            return row
        except BaseException:
            self._joining = [other for other in self._joining if other is not row]  # the caller has not got it
            raise

    def step(self) -> list[tuple[Row, int]]:
        """Run one step of the batch.

        A row that ends with this step leaves the batch. A row whose prompt cannot be run, or whose next token cannot be
        picked, leaves with its error and gets no id. If this raises, it may be tried again: the rows have not changed,
        or they have their new ids and the next call returns them.

        Returns:
            The new id of every running row, end-of-sequence ids included; empty if no row is left.
        """
        while True:
            if self._picked is None:
                if self._failed:
                    self._settle()
                self._failed = True
                # 0. Run prompts: one chunk while rows wait for their next id, otherwise all prompts.
                self._run_prompts(self._prefill_tokens if self._running else None)
                rows = self._running
                if not rows:
                    self._failed = False
                    return []
                # 1. Run the last id of every row, together.
                logits = self._rows.step(rows)
                # 2. Pick a token for each row, with its own sampler and its own ids.
                histories = [row.tokens for row in rows]
                draws = [len(row.tokens) - row.prompt_tokens for row in rows]
                picked = pick_rows([row.sampler for row in rows], logits, histories, draws)
                self._picked = list(zip(rows, map(len, histories), picked, strict=True))
            # 3. Give the rows their tokens; rows that have ended leave.
            self._settle()
            picks = self._picked
            out = [(row, token) for row, _length, token in picks if not isinstance(token, Exception)]
            try:
                self._failed, self._picked = False, None
                if out:
                    return out
            except BaseException:
                self._picked = picks  # the caller has not got them
                raise

    def leave(self, row: Row) -> None:
        """Take a row out of the batch before it ends; a row that has ended already does not change."""
        if self._failed:
            self._settle()
        self._failed = True
        if row in self._running:
            self._end(row, "left")
        elif row in self._joining:
            row.finish_reason = "left"
            self._joining.remove(row)
        self._failed = self._picked is not None

    def _settle(self) -> None:
        """Finish what an earlier call began; if nothing failed, only give the rows the tokens that were picked."""
        for row, length, token in self._picked or ():
            if isinstance(token, Exception):
                row.fail(token)
            elif len(row.tokens) == length:
                row.tokens.append(token)
        for row in list(self._running):
            if row.finish_reason is not None:
                self._drop(row)
            elif len(row.tokens) > row.prompt_tokens:
                if row.tokens[-1] in row.eos_ids:
                    self._end(row, "eos")
                elif len(row.tokens) == row.token_limit:
                    self._end(row, "length")
        if self._joining:
            running = set(self._running)
            self._joining = [row for row in self._joining if row.finish_reason is None and row not in running]

    def _run_prompts(self, most: int | None) -> None:
        """Run at most `most` ids of the joining rows' prompts, in the order of the rows; None runs all ids."""
        for row in list(self._joining):
            if most == 0:
                return
            try:
                ran = self._run_prompt(row, most)
            except Exception as error:  # the error belongs to this row; the other rows continue
                row.fail(error)
                self._settle()
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
            self._graph.forward(chunk, cache, row.bound, held=row.held)
        if len(cache) == len(prompt) - 1:
            if chunk and self._prefix_cache is not None:
                self._prefix_cache.offer(cache, lambda: self._graph.content(cache))
            running = [*self._running, row]
            self._rows.prepare(running)
            self._running = running
            self._joining.remove(row)
        return len(chunk)

    def _end(self, row: Row, reason: str) -> None:
        """End a running row, whose keys and values go to the prefix cache."""
        try:
            if self._prefix_cache is not None:
                row.follow()
                self._prefix_cache.offer(row.cache, lambda: self._rows.content(row))
        finally:
            row.finish_reason = reason
            self._drop(row)

    def _drop(self, row: Row) -> None:
        """Take a row that has ended out of the running ones; the last row takes its place."""
        at, last = self._running.index(row), len(self._running) - 1
        running = self._running[:last]
        if at < last:
            running[at] = self._running[last]
        self._running = running
