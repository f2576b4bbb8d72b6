"""Measures prompt-lookup decoding: the time per token with and without it, on tasks that copy and on free text.

    python -m benchmarks.lookup MODEL_DIR... [--lookup N] [--tokens N] [--rounds N]
    python -m benchmarks.lookup MODEL_DIR... --cost

Both sides of a task run in one process and take turns id by id, so that the other work of the machine meets both. A
ratio compares the two times of one completion, and the table has the medians over rounds and tasks. Times are those of
the processor: on one thread they are the times of a machine that has nothing else to do, apart from caches. The first
token is left out: it is the prompt's run, which lookup does not change. Free text is sampled, because a small model
that decodes greedily soon repeats itself, and repeated text is copied text. `--cost` measures the time of a run of
several ids instead, in runs of one id.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tp_runtime import PatchedModel
from tp_runtime.generation import LookupStats, Sampler, Sampling, generate

LETTER = """Dear Ms Novak,

Thank you for your order of 24 garden chairs and 6 tables of the series Alma. We will deliver them on Monday, 14 April,
between 8 and 11 in the morning. Our driver, Mr Brandt, will call you half an hour before he arrives. Please make sure
that the gate to the yard is open and that nobody parks in front of it. The invoice of 3,180 euros is due within 30
days. If a chair is damaged, please send a photo of it to service@alma-garden.example, and we will replace it on Monday
of the following week without any cost to you. The old furniture can be taken back by our driver for 5 euros a piece.

Kind regards,
Teresa Lindgren
Alma Garden Furniture"""

SHOP = """Northwind rents and repairs bicycles in Tromso. The shop is open from eight to seven on weekdays and from ten
to four on Saturdays. A city bicycle costs fifteen euros a day. A mountain bicycle costs twenty-five euros a day. An
electric bicycle costs forty euros a day. Renters must be at least sixteen years old and show a passport or a driving
licence. The deposit is one hundred euros. Repairs take two working days. A flat tyre costs twelve euros, new brakes
cost thirty euros and a full service costs eighty euros. Repairs carry a guarantee of six months. Guided tours start at
nine every Friday at the harbour and cost sixty euros with lunch."""

CODE = '''class Stock:
    """The goods of a shop by name."""

    def __init__(self):
        self.items = {}

    def add(self, name, count):
        if count < 1:
            raise ValueError("count must be at least 1")
        self.items[name] = self.items.get(name, 0) + count

    def take(self, name, count):
        if self.items.get(name, 0) < count:
            raise ValueError("there are not that many")
        self.items[name] -= count
        if self.items[name] == 0:
            del self.items[name]

    def total(self):
        return sum(self.items.values())'''


@dataclass(frozen=True)
class Task:
    """One prompt of the benchmark.

    Attributes:
        kind: the row of the table.
        text: the text to work on; empty for free text.
        chat: the instruction for a chat model, which comes after the text.
        completion: the beginning of the answer for a completion-style model, which comes after the text.
    """

    kind: str
    text: str
    chat: str
    completion: str

    def prompt(self, style: str) -> str:
        """Return the prompt for a model of that style."""
        asked = self.chat if style == "chat" else self.completion
        return f"{self.text}\n\n{asked}" if self.text else asked


TASKS = (
    Task(
        "edit",
        LETTER,
        "Write this letter again, word for word, but with Wednesday instead of Monday.",
        "The same letter, with Wednesday instead of Monday:\n\nDear Ms Novak,\n\nThank you for your order",
    ),
    Task(
        "edit",
        CODE,
        "Write this class again with the method `take` renamed to `remove`.",
        "# The same class, with the method `take` renamed to `remove`:\n\nclass Stock:\n",
    ),
    Task(
        "extract",
        SHOP,
        "List every sentence of this text that names a price, one in each line.",
        "The sentences of this text that name a price, one in each line:\n\n- A city bicycle costs",
    ),
    Task(
        "extract",
        LETTER,
        "Extract the customer, the goods, the day of delivery, the driver, the amount and the address for complaints.",
        "Customer: Ms Novak\nGoods:",
    ),
    Task(
        "quote",
        SHOP,
        'Which rules are there for renters and for repairs? Answer with quotes from the text: "..."',
        'The text says about repairs: "Repairs take two',
    ),
    Task(
        "quote",
        LETTER,
        'What does the letter say about damaged chairs and the invoice? Quote these sentences: "..."',
        'About the invoice, the letter says: "The invoice',
    ),
    Task(
        "free",
        "",
        "Write a short story about a lighthouse keeper who finds a message in a bottle.",
        "The lighthouse keeper found the bottle on a morning in March.",
    ),
    Task("free", "", "Explain how rain forms, and why some clouds bring none.", "Rain forms when"),
    Task("free", "", "What should I look at when I buy a used bicycle?", "Before you buy a used bicycle,"),
)

FREE = Sampling(temperature=0.8, seed=1)
COST_IDS, COST_PAST, COST_ROUNDS = (1, 2, 3, 4, 6, 8, 12, 16), 300, 25


@dataclass(frozen=True)
class Round:
    """Both sides of one task in one round.

    Attributes:
        plain: the seconds of the processor per token without lookup.
        drafting: the same with it.
        same: whether the ids are the same.
        stats: the drafts.
        tokens: the tokens of the completion.
    """

    plain: float
    drafting: float
    same: bool
    stats: LookupStats
    tokens: int


def compare(model: PatchedModel, task: Task, tokens: int, lookup: int, first: int) -> Round:
    """Run one task without lookup and with it, in turns; `first` is the side that begins."""
    prompt = model.codec.render(task.prompt(model.graph.folder.style))
    stats = LookupStats(), LookupStats()
    options: dict[str, Any] = {"max_new_tokens": tokens, "eos_ids": model.codec.eos_ids}
    sides = [
        generate(model.graph, prompt, model.graph.base, sampler=sampler, stats=own, lookup=most, **options)
        for most, own in zip((0, lookup), stats, strict=True)
        for sampler in [Sampler(FREE if task.kind == "free" else Sampling())]
    ]
    got = [[next(side)] for side in sides]
    seconds, running = [0.0, 0.0], {0, 1}
    while running:
        for side in (first, 1 - first):
            if side in running:
                start = time.process_time()
                token = next(sides[side], None)
                seconds[side] += time.process_time() - start
                if token is None:
                    running.remove(side)
                else:
                    got[side].append(token)
    plain, drafting = (own / max(1, len(ids) - 1) for own, ids in zip(seconds, got, strict=True))
    return Round(plain, drafting, got[0] == got[1], stats[1], len(got[0]))


def measure(model: PatchedModel, tokens: int, lookup: int, rounds: int) -> dict[str, list[Round]]:
    """Return the rounds of all tasks by kind. The side that begins changes from round to round."""
    found: dict[str, list[Round]] = {}
    for task in TASKS[:2]:  # the first runs of a session allocate
        compare(model, task, 8, lookup, 0)
    for number in range(rounds):
        for task in TASKS:
            found.setdefault(task.kind, []).append(compare(model, task, tokens, lookup, number % 2))
    return found


def row(name: str, kind: str, rounds: list[Round]) -> str:
    """Return a row of the table."""
    plain, drafting = (1000 * statistics.median(getattr(one, side) for one in rounds) for side in ("plain", "drafting"))
    ratio = statistics.median(one.plain / one.drafting for one in rounds)
    drafted, accepted = (sum(getattr(one.stats, what) for one in rounds) for what in ("drafted", "accepted"))
    runs, tokens = sum(one.stats.runs for one in rounds), sum(one.tokens for one in rounds)
    same = sum(one.same for one in rounds)
    cells = name, kind, f"{plain:.1f}", f"{drafting:.1f}", f"{ratio:.2f}", f"{tokens / runs:.2f}"
    right = f"{accepted / drafted:.0%}" if drafted else "-"
    return f"| {' | '.join(cells)} | {right} | {same} of {len(rounds)} |"


def costs(model: PatchedModel) -> dict[int, float]:
    """Return the median time of a run of several ids behind a prompt, in runs of one id of the same round."""
    graph = model.graph
    ids = np.random.default_rng(0).integers(1000, graph.folder.vocab_size - 1000, COST_PAST + max(COST_IDS)).tolist()
    cache = graph.new_cache(graph.base)
    graph.forward(ids[:COST_PAST], cache, graph.base)
    seconds: dict[int, list[float]] = {count: [] for count in COST_IDS}
    for _round in range(COST_ROUNDS):
        for count in COST_IDS:
            del cache.tokens[COST_PAST:]
            start = time.perf_counter()
            graph.forward(ids[COST_PAST : COST_PAST + count], cache, graph.base, copy=False, last=count)
            seconds[count].append(time.perf_counter() - start)
    return {
        count: statistics.median(own / one for own, one in zip(times, seconds[1], strict=True))
        for count, times in seconds.items()
    }


def main() -> None:
    """Measure the folders of the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path, nargs="+")
    parser.add_argument("--lookup", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cost", action="store_true")
    args = parser.parse_args()
    if args.cost:
        print("| model | " + " | ".join(f"{count} ids" for count in COST_IDS) + " |")
        print("| --- |" + " --- |" * len(COST_IDS))
    else:
        print("| model | task | ms per token | with lookup | times as fast | ids per run | drafts right | same ids |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for path in args.model_dir:
        model = PatchedModel.from_pretrained(path, "cpu", threads=1)
        name = f"{model.graph.folder.base_model} {model.graph.folder.precision}"
        if args.cost:
            print(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in costs(model).values()) + " |", flush=True)
            continue
        for kind, rounds in measure(model, args.tokens, args.lookup, args.rounds).items():
            print(row(name, kind, rounds), flush=True)


if __name__ == "__main__":
    main()
