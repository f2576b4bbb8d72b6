"""A running batch, on token ids: sequences under different patches that step together, join and leave between steps.

Like engine.py it knows nothing of text, files or names. What a sequence gives out does not depend on what else is in
the batch: its prompt is run alone, its patch, lengths and positions are its own, and so is the sampler it draws from.
Nor does a long prompt stop the others: while they run, a step runs a piece of it and then their next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import ModelFormatError, RequestError
from ..session import BoundPatch, Graph, KVCache
from .engine import check_request
from .prefix_cache import PrefixCache
from .rows import new_rows
from .sampling import Sampler, Sampling, pick_rows

PREFILL_TOKENS = 32  # a CPU takes hardly longer for a prompt in pieces of so many than for all of it at once


@dataclass(eq=False)
class Row:
    """One sequence of a batch.

    Attributes:
        tokens: ids of prompt and completion so far; the last one has not been run yet.
        prompt_tokens: how many of them are the prompt.
        bound: the patch it runs under.
        full: the number of ids at which it ends.
        eos_ids: ids that end it.
        sampler: picks its ids.
        cache: what of it has been run.
        begun: whether any of its prompt has been run, or found in the prefix cache.
        finish_reason: "eos", "length", "left" or "error" once it has left the batch, None before.
        error: why its prompt could not be run, or nothing be picked from its logits; only with "error".
    """

    tokens: list[int]
    prompt_tokens: int
    bound: BoundPatch
    full: int
    eos_ids: frozenset[int]
    sampler: Sampler
    cache: KVCache
    begun: bool = field(default=False, init=False)
    finish_reason: str | None = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)


class Batch:
    """Sequences over one graph; for one thread at a time.

    Args:
        graph: where the steps are run.
        rows: most sequences at once.
        prefix_cache: where prompts find what was run before, and leave what they have run.
        prefill_tokens: of prompts, run between two tokens of the rows that wait for theirs.

    Raises:
        RequestError: `rows` or `prefill_tokens` is no number of them.
    """

    def __init__(
        self, graph: Graph, rows: int, prefix_cache: PrefixCache | None = None, prefill_tokens: int = PREFILL_TOKENS
    ) -> None:
        for name, value in (("rows", rows), ("prefill_tokens", prefill_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RequestError(f"not a number of {name}", field=name, got=repr(value), wanted="a whole number >= 1")
        self._graph, self._limit, self._prefix_cache, self._piece = graph, rows, prefix_cache, prefill_tokens
        self._joining: list[Row] = []  # whose prompts are not run to their end yet
        self._running: list[Row] = []  # in the order of the graph's rows
        self._rows = new_rows(graph, rows)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The sequences that run now."""
        return tuple(self._running)

    @property
    def joining(self) -> tuple[Row, ...]:
        """The sequences whose prompts are still to be run, or being run."""
        return tuple(self._joining)

    @property
    def free(self) -> int:
        """How many more may join."""
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
        """Let a sequence take part as soon as steps have run its prompt, all but the last id.

        Args:
            prompt: at least one id.
            bound: the patch, for every step of this sequence.
            sampling: how its ids are picked.
            max_new_tokens: at least 1.
            eos_ids: ids that end it.

        Raises:
            RequestError: as engine.generate; an id outside the vocabulary; or there is no room. The batch is as it
                was.
        """
        full = check_request(self._graph.folder, prompt, bound, max_new_tokens)
        self._graph.check_ids(prompt)
        if not self.free:
            raise RequestError(
                "the batch is full",
                field="rows",
                got=f"{self._limit} sequences in it",
                wanted=f"fewer than {self._limit}",
                fix="step until one has ended, let one leave, or make the batch with more rows",
            )
        cache = self._graph.new_cache(bound)
        row = Row(list(prompt), len(prompt), bound, full, eos_ids, Sampler(sampling), cache)
        self._joining.append(row)
        return row

    def step(self) -> list[tuple[Row, int]]:
        """One id for every row, end-of-sequence ids included; rows that it ends leave. Nothing without rows.

        A row whose prompt cannot be run, or whose logits are not finite, leaves with its error and gives no id. Where
        the run of all rows fails, nothing has happened to them, and the step may be tried again.
        """
        # 0. Run prompts: while rows wait for their next id, a piece; otherwise all that there are.
        self._run_prompts(self._piece if self._running else None)
        rows = list(self._running)
        if not rows:
            return []
        # 1. Run the last id of every row, together.
        logits = self._rows.step([row.tokens[-1] for row in rows])
        # 2. Pick for each by its own sampler, from its own ids.
        picked = pick_rows([row.sampler for row in rows], logits, [row.tokens for row in rows])
        # 3. Hand out; what has ended leaves.
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
            elif len(row.tokens) == row.full:
                self._end(row, "length")
        return out

    def leave(self, row: Row) -> None:
        """End a row before its time; one that has ended already is left alone."""
        if row in self._running:
            self._end(row, "left")
        elif row in self._joining:
            self._joining.remove(row)
            row.finish_reason = "left"

    def _run_prompts(self, most: int | None) -> None:
        """Run at most so many ids of the prompts of those that join, in their order; None runs them all."""
        for row in list(self._joining):
            if most == 0:
                return
            try:
                ran = self._run_prompt(row, most)
            except Exception as error:  # its own: the others go on
                self._joining.remove(row)
                row.error, row.finish_reason = error, "error"
            else:
                most = None if most is None else most - ran

    def _run_prompt(self, row: Row, most: int | None) -> int:
        """Run the next ids of a row's prompt, all but the last; with these run, it takes part. Returns how many."""
        cache, prompt = row.cache, row.tokens
        if self._prefix_cache is not None and not row.begun:
            self._prefix_cache.fill(cache, prompt)
        row.begun = True
        early = prompt[len(cache) : -1][:most]
        if early:
            self._graph.forward(early, cache, row.bound)
        if len(cache) == len(prompt) - 1:
            if early and self._prefix_cache is not None:
                self._prefix_cache.keep(cache, lambda: self._graph.content(cache))
            self._rows.add(cache, row.bound)
            self._joining.remove(row)
            self._running.append(row)
        return len(early)

    def _end(self, row: Row, reason: str) -> None:
        at = self._running.index(row)
        if self._prefix_cache is not None and reason != "error":
            self._prefix_cache.keep(row.cache, lambda: self._rows.content(at))
        self._rows.remove(at)
        self._running[at] = self._running[-1]
        del self._running[-1]
        row.finish_reason = reason
