"""The protocol of the worker processes: one line of JSON per command on stdin, and one per answer on stdout.

    {"do": "load", "path": ..., "threads": 1, "room": n}
                                                   -> {"seconds": ..., "versions": {...}}
    {"do": "answer", "context": [ids], "question": [ids], "cached": false, "tokens": 8, "patch": null}
                                                   -> {"first": s, "at": clock, "steps": [s, ...], "ids": [...]}
    {"do": "memory"}                               -> {"peak": bytes, "resident": bytes, "anonymous": bytes}
    {"do": "bye"}                                  -> the process ends

The time of an answer's first token starts when the worker has the ids and ends when it has the next id. It includes a
new KV cache. With `cached` the context is in the cache already, and the worker runs only the question. `at` is the time
at which the first token was ready, on the clock that all processes of a machine share. Each runtime is a subclass of
`Worker` with three methods.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


class Worker(ABC):
    """A runtime with one model and one KV cache. It decodes greedily and ignores end-of-sequence ids.

    Attributes:
        packages: the packages whose versions the worker reports.
        room: the number of positions that the next cache needs, for runtimes that allocate all of them at once.
        can_rewind: whether a cache can go back to an earlier length, which a cached context needs.
    """

    packages: tuple[str, ...] = ()
    can_rewind = True

    def __init__(self) -> None:
        self._held: list[int] = []  # the ids that the cache starts with
        self.room = 0

    @abstractmethod
    def load(self, path: Path, threads: int) -> None:
        """Load the model. Imports do not count as load time, so they belong at the top of the worker's module."""

    @abstractmethod
    def reset(self) -> None:
        """Discard the cache."""

    @abstractmethod
    def step(self, ids: Sequence[int]) -> int:
        """Run `ids` after the ids in the cache, and return the likeliest next id."""

    def rewind(self, length: int) -> None:
        """Discard all but the first `length` positions of the cache."""
        raise NotImplementedError

    def select(self, patch: int | str | None) -> None:
        """Run the next ids under a patch: the file at this path, a random patch of this rank, or no patch."""
        if patch is not None:
            raise ValueError(f"{type(self).__name__} does not support patches")

    def answer(
        self,
        context: Sequence[int],
        question: Sequence[int],
        cached: bool = False,
        tokens: int = 0,
        patch: int | str | None = None,
    ) -> dict[str, Any]:
        """Time the first token after context and question, and `tokens` further tokens."""
        context, question = list(context), list(question)
        self.select(patch)
        self.room = len(context) + len(question) + tokens + 1
        if cached:
            if self._held != context:
                self.reset()
                self.step(context)
            self.rewind(len(context))
            start = time.perf_counter()
        else:
            start = time.perf_counter()
            self.reset()
            question = context + question
        ids = [self.step(question)]
        at = time.perf_counter()
        first = at - start
        steps = []
        for _ in range(tokens):
            start = time.perf_counter()
            ids.append(self.step(ids[-1:]))
            steps.append(time.perf_counter() - start)
        self._held = context if self.can_rewind else []
        return {"first": first, "at": at, "steps": steps, "ids": ids}


def memory() -> dict[str, int]:
    """Return bytes of this process: peak resident, resident now, and the resident part that no file backs."""
    wanted = {"VmHWM": "peak", "VmRSS": "resident", "RssAnon": "anonymous"}
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in wanted:
            found[wanted[name]] = 1024 * int(value.split()[0])
    return found


def serve(worker: Worker) -> None:
    """Answer commands until `bye` or the end of stdin."""
    # Libraries also print to stdout. The answers go to a copy of it, and stdout itself becomes stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        if do == "bye":
            break
        try:
            result = _run(worker, do, command)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(result) + "\n")
        answers.flush()
    os._exit(0)  # some runtimes take seconds to shut down, and crash meanwhile


def _run(worker: Worker, do: str, command: dict[str, Any]) -> dict[str, Any]:
    if do == "load":
        start = time.perf_counter()
        worker.room = command["room"]
        worker.load(Path(command["path"]), command["threads"])
        seconds = time.perf_counter() - start
        versions = {name: metadata.version(name) for name in worker.packages}
        return {"seconds": seconds, "versions": versions, "can_rewind": worker.can_rewind}
    if do == "memory":
        return memory()
    if do == "answer":
        return worker.answer(**command)
    extra = getattr(worker, f"do_{do}", None)
    if extra is None:
        raise ValueError(f"unknown command {do!r}")
    found: dict[str, Any] = extra(**command)
    return found
