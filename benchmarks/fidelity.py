"""Measures how much of a context a patch keeps, for each kind of context and form: the table of docs/fidelity.md.

    python benchmarks/fidelity.py SMOLLM2 GEMMA [--only NAME,...] [--out build/fidelity]

SMOLLM2 and GEMMA are the folders that `tp-export fetch` prints. The script stores the teacher's answers in --out. An
interrupted run therefore continues where it stopped, and every form of one context is fitted on the same rows. The
script prints one line of JSON for each patch.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tp_export.fit import Recipe, Settings, make_patch
from tp_export.measure import measure_accuracy, torch_answers
from tp_export.queries import load_answers, load_questions
from tp_export.rollout import RolloutStore
from tp_export.source import load_model, open_source

HERE = Path(__file__).parent / "contexts"
DEMO = Path(__file__).parent.parent / "demo"


@dataclass(frozen=True)
class Case:
    """A context, the queries for the fit, the queries for the measurement, and the recipes to try."""

    name: str
    base: str  # "smollm2" or "gemma"
    queries: Path | None
    held_out: Path
    recipes: tuple[Recipe, ...]
    limit: int = 64
    sentences: int | None = None  # the number of sentences of the context to use; None uses all of them

    def context(self) -> str:
        """Return the text to absorb."""
        text = (HERE / f"{self.name.partition('-')[0]}.txt").read_text(encoding="utf-8").rstrip("\n")
        return text if self.sentences is None else "".join(re.findall(r"[^.]+\.", text)[: self.sentences])


def recipe(method: str = "output", rank: int = 16, prefix: int = 0, **options: Any) -> Recipe:
    """Build a recipe from the options that vary in this table."""
    return Recipe(method=method, settings=Settings(rank), prefix=prefix, **options)


SHORT = {"max_new_tokens": 8}
CASES = (
    Case("translation", "gemma", HERE / "translation-queries.txt", HERE / "translation-held-out.jsonl", (
        recipe("vector", **SHORT), recipe(**SHORT), recipe(rank=32, **SHORT), recipe(prefix=8, **SHORT),
    )),
    Case("operators", "gemma", HERE / "operators-queries.txt", HERE / "operators-held-out.jsonl", (
        recipe("vector", **SHORT), recipe(**SHORT), recipe(rank=32, **SHORT), recipe(prefix=8, **SHORT),
        recipe(prefix=24, **SHORT),
    )),
    Case("facts", "smollm2", HERE / "facts-queries.txt", HERE / "facts-held-out.jsonl", (
        recipe(prefix=96), recipe(prefix=64), recipe(), recipe("prefix", prefix=64),
    )),
    # The model wrote these queries itself: tp-export questions SMOLLM2 policy.txt policy-queries.txt --rounds 4
    Case("policy", "smollm2", HERE / "policy-queries.txt", HERE / "policy-held-out.txt", (
        recipe(prefix=96, samples=1), recipe(samples=1), recipe("prefix", prefix=96, samples=1),
    ), 80),
    Case("french", "smollm2", None, DEMO / "held-out.txt", (recipe(prefix=4), recipe(), recipe("vector"))),
    Case("persona", "smollm2", None, DEMO / "held-out.txt", (
        recipe(prefix=16), recipe(), recipe(rank=32), recipe("vector"), recipe("prefix", prefix=16),
        recipe("matrix"), recipe(refine_steps=30),
    )),
    # These cases vary the number of calibration queries.
    *(Case(f"persona-{n}", "smollm2", None, DEMO / "held-out.txt", (recipe(),), n) for n in (16, 32)),
    # These cases show how fidelity falls with the number of facts. Each context is the first sentences of the fact
    # sheet, and all of them use the same queries.
    *(
        Case(f"facts-{n}", "smollm2", HERE / "facts-queries.txt", HERE / "facts-held-out.jsonl", (
            recipe(samples=1), recipe(prefix=16, samples=1),
        ), sentences=n)
        for n in (2, 4, 6, 8, 11)
    ),
)  # fmt: skip


def main() -> None:
    """Run the cases and print each result as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("smollm2")
    parser.add_argument("gemma")
    parser.add_argument("--only", default=",".join(case.name for case in CASES))
    parser.add_argument("--out", type=Path, default=Path("build/fidelity"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    bases: dict[str, Any] = {}
    for case in CASES:
        if case.name not in args.only.split(","):
            continue
        if case.base not in bases:
            source = open_source(getattr(args, case.base))
            bases[case.base] = source, load_model(source)
        source, model = bases[case.base]
        context = case.context()
        fitted, held = load_questions(case.queries)[: case.limit], load_questions(case.held_out)
        answers = load_answers(case.held_out)
        store = RolloutStore(args.out / f"{case.name}.jsonl", source.digest)
        for one in case.recipes:
            start = time.perf_counter()
            name = f"{case.name}-{one.method}-r{one.settings.rank}-p{one.prefix}"
            name += f"-refined{one.refine_steps}" if one.refine_steps else ""
            patch = make_patch(source, model, context, fitted, held, one, name=name, store=store)
            seconds = time.perf_counter() - start
            file = args.out / f"{name}.safetensors"
            patch.save(file)
            figures = dict(patch.config.fidelity or {})
            if answers:
                unpatched, patched = (torch_answers(source, model, p, one.max_new_tokens) for p in (None, patch))
                figures |= measure_accuracy(source, context, answers, unpatched, unpatched, patched).to_dict()
            shown = {
                "patch": name,
                "context_tokens": len(source.codec.render(context, raw=True)),
                "megabytes": round(file.stat().st_size / 1e6, 2),
                "seconds": round(seconds),
                **figures,
            }
            print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
