"""The commands to every runtime, their order, and the figures that are kept of the answers.

In a round, each command goes to the runtimes of one precision one after another. The next round begins with another
runtime. A machine that slows down or speeds up therefore affects all the runtimes that are compared.
"""

from __future__ import annotations

import compileall
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.pool import Process, WorkerError
from benchmarks.speed.rivals import LONG_RIVALS, Rival

_WARM, _WARM_TOKENS = 32, 64  # in tokens; a new process runs them first, and huge pages arrive meanwhile


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        text: the ids that contexts and the question are taken from.
        contexts: the lengths of the context before the question, in tokens.
        decode: the context lengths after which tokens are decoded too.
        long: further lengths of the context, which only LONG_RIVALS read, and after which they decode too.
        question: the length of the question in tokens. Without a context, with a cached one, or with a patch, only the
            question runs.
        tokens: the number of tokens decoded in a round.
        rounds: the number of rounds, each in new processes.
        cold: the number of cold starts in new processes, after one that warms up; 0 leaves them out.
        rank: the rank of the random patch.
    """

    text: tuple[int, ...]
    contexts: tuple[int, ...] = (32, 128, 512, 2048)
    decode: tuple[int, ...] = (128, 2048)
    long: tuple[int, ...] = ()
    question: int = 16
    tokens: int = 16
    rounds: int = 5
    cold: int = 5
    rank: int = 16

    def room(self, rival: Rival) -> int:
        """Return the number of positions that the longest answer of a runtime needs."""
        longest = max((*self.contexts, *self._long(rival)), default=0)
        return 1 + max(longest + self.question + self.tokens, _WARM + 1 + _WARM_TOKENS)

    def asks(self, rival: Rival) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the commands of one round, each with the name that its answer is kept under."""
        question = list(self.text[: self.question])
        rest = self.text[self.question :]
        yield "none", {"context": [], "question": question}
        if rival.takes_patches:
            yield "patch", {"context": [], "question": question, "patch": self.rank}
        for length in self.contexts:
            tokens = self.tokens if length in self.decode else 0
            context = list(rest[:length])
            yield f"prompt-{length}", {"context": context, "question": question, "tokens": tokens}
            yield f"cached-{length}", {"context": context, "question": question, "cached": True}
        for length in self._long(rival):
            context = list(rest[:length])
            yield f"prompt-{length}", {"context": context, "question": question, "tokens": self.tokens}
        if rival.takes_patches and self.decode:
            context = list(rest[: self.decode[0]])
            command = {"context": context, "question": question, "tokens": self.tokens, "patch": self.rank}
            yield f"patched-{self.decode[0]}", command

    def _long(self, rival: Rival) -> tuple[int, ...]:
        return self.long if rival.key in LONG_RIVALS else ()


@dataclass
class Found:
    """Every sample of one runtime, in seconds and bytes.

    Attributes:
        cold: the times from the start of a process to its first token.
        load: the times to load the model in these processes, without imports.
        memory: the memory of these processes after the first token.
        worked: the memory after all rounds.
        versions: the versions of the runtime's packages.
        first: for each command's name, the times of the first token.
        step: for each command's name, the medians of the further tokens of a round.
        ids: for each command's name, the ids that the last round answered.
        failed: for each command's name, or "all", the reason for the failure.
    """

    cold: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    memory: list[dict[str, int]] = field(default_factory=list)
    worked: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    first: dict[str, list[float]] = field(default_factory=dict)
    step: dict[str, list[float]] = field(default_factory=dict)
    ids: dict[str, list[int]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def keep(self, name: str, answer: dict[str, Any]) -> None:
        """Keep one answer of a round."""
        self.first.setdefault(name, []).append(answer["first"])
        if answer["steps"]:
            self.step.setdefault(name, []).append(median(answer["steps"]))
        self.ids[name] = answer["ids"]

    def report(self) -> dict[str, Any]:
        """Return the medians together with the samples."""
        report: dict[str, Any] = {"failed": self.failed, "versions": self.versions}
        if self.cold:
            report |= {"cold_start_s": median(self.cold), "load_s": median(self.load)}
            report["memory_first_token"] = {key: median(m[key] for m in self.memory) for key in self.memory[0]}
        report |= {
            "memory_worked": self.worked,
            "first_s": {name: median(values) for name, values in self.first.items()},
            "token_s": {name: median(values) for name, values in self.step.items()},
            "ids": self.ids,
            "samples": {"cold_start": self.cold, "load": self.load, "first": self.first, "token": self.step},
        }
        return report


def cold_starts(rivals: Sequence[Rival], models: Path, threads: int, plan: Plan, found: dict[str, Found]) -> None:
    """Start new processes one at a time, and time each until its first token after a prompt of 32 tokens."""
    prompt = list(plan.text[:32])
    _compile("tp_runtime")
    for number in range(plan.cold + 1 if plan.cold else 0):
        for rival in _rotated(rivals, number):
            if "all" in found[rival.key].failed:
                continue
            _print_progress(f"cold start {number + 1} of {plan.cold + 1}: {rival.label}")
            with _recording_failure(found[rival.key], "all"), Process(rival.module, threads) as process:
                loaded = process.ask("load", path=str(models / rival.files), threads=threads, room=plan.room(rival))
                ended = process.ask("answer", context=[], question=prompt)["at"]
                if number > 0:  # the first start reads the files into memory
                    found[rival.key].cold.append(ended - process.started)
                    found[rival.key].load.append(loaded["seconds"])
                    found[rival.key].memory.append(process.ask("memory"))


def _compile(package: str) -> None:
    """Compile the modules of a package that may be a checkout: pip has compiled the others when it installed them."""
    spec = util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        compileall.compile_dir(folder, quiet=1)


def live_rounds(
    rivals: Sequence[Rival], models: Path, threads: int, plan: Plan, found: dict[str, Found]
) -> list[float]:
    """Run all rounds, and measure the memory bandwidth in each.

    A round loads all runtimes of one precision and interleaves their commands, then does the same for the next
    precision. Every round starts new processes, because the place where a process's memory happens to lie changes the
    time of a token by up to a fifth, and that place stays the same until the process ends.

    Returns:
        For each round, the bytes per second at which memory was read.
    """
    bandwidths = []
    with Process("bandwidth", threads) as stream:
        stream.ask("load", path="", threads=threads, room=0)
        for number in range(plan.rounds):
            bandwidths.append(stream.ask("stream")["bytes_per_second"])
            for bits in dict.fromkeys(rival.bits for rival in rivals):
                same_bits = [rival for rival in rivals if rival.bits == bits]
                with contextlib.ExitStack() as stack:
                    live = _loaded(stack, _rotated(same_bits, number), models, threads, plan, found)
                    _round(live, number, plan, found)
    return bandwidths


def _loaded(
    stack: contextlib.ExitStack,
    rivals: Sequence[Rival],
    models: Path,
    threads: int,
    plan: Plan,
    found: dict[str, Found],
) -> list[tuple[Rival, Process, bool]]:
    """Start new processes and let each answer once; return each with whether its cache can go back."""
    live = []
    for rival in rivals:
        if "all" in found[rival.key].failed:
            continue
        _print_progress(f"load {rival.label}")
        with _recording_failure(found[rival.key], "all"):
            process = stack.enter_context(Process(rival.module, threads))
            loaded = process.ask("load", path=str(models / rival.files), threads=threads, room=plan.room(rival))
            process.ask("answer", context=list(plan.text[:_WARM]), question=list(plan.text[:1]), tokens=_WARM_TOKENS)
            found[rival.key].versions = loaded["versions"]
            live.append((rival, process, loaded["can_rewind"]))
    return live


def _round(live: Sequence[tuple[Rival, Process, bool]], number: int, plan: Plan, found: dict[str, Found]) -> None:
    asks = {rival.key: dict(plan.asks(rival)) for rival, _, _ in live}
    names = dict.fromkeys(name for commands in asks.values() for name in commands)
    for name in names:
        for rival, process, can_rewind in live:
            key = rival.key
            if name not in asks[key] or {"all", name} & set(found[key].failed):
                continue
            if name.startswith("cached") and not can_rewind:
                found[key].failed[name] = "its cache cannot go back to an earlier length"
                continue
            _print_progress(f"round {number + 1} of {plan.rounds}, {name}: {rival.label}")
            with _recording_failure(found[key], name):
                found[key].keep(name, process.ask("answer", **asks[key][name]))
    for rival, process, _ in live:
        with _recording_failure(found[rival.key], "memory"):
            found[rival.key].worked = process.ask("memory")


@contextlib.contextmanager
def _recording_failure(found: Found, name: str) -> Iterator[None]:
    """Record an error for the runtime that it happened to, and for no other."""
    try:
        yield
    except WorkerError as error:
        found.failed[name] = str(error)
        _print_progress(f"failed: {error}", end="\n")


def _rotated(items: Sequence[Any], by: int) -> list[Any]:
    by %= len(items) or 1
    return [*items[by:], *items[:by]]


def _print_progress(line: str, end: str = "") -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line[:110]}", end=end, file=sys.stderr, flush=True)
    elif end or "none" in line or "cold" in line:
        print(line, file=sys.stderr, flush=True)
