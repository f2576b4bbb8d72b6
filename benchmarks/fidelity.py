"""Measures how much of a context a patch keeps, for each kind of context and form: the tables of docs/fidelity.md.

    python benchmarks/fidelity.py SMOLLM2 GEMMA [--only NAME,...] [--out build/fidelity]

SMOLLM2 and GEMMA are the folders that `tp-export fetch` prints. The script stores the teacher's answers in --out. An
interrupted run therefore continues where it stopped, and every form of one context is fitted on the same rows. The
script prints one line of JSON for each patch, and one before the patches of quantised weights: what these weights keep
of the right answers with the context itself in front.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tp_export.fit import ALL, Recipe, Settings, make_patch, student_for
from tp_export.measure import recorded_answers, right_answers, share_kept, torch_answers
from tp_export.quantise import QuantisedStudent, as_student
from tp_export.queries import load_answers, load_questions
from tp_export.rollout import Prompting, RolloutStore, dialogues_for
from tp_export.source import Source, load_model, open_source

HERE = Path(__file__).parent / "contexts"
TASKS = Path(__file__).parent / "tasks"
DEMO = Path(__file__).parent.parent / "demo"


@dataclass(frozen=True)
class Case:
    """A context, the queries for the fit, the queries for the measurement, and the recipes to try."""

    name: str
    base: str  # "smollm2" or "gemma"
    context: Path
    queries: Path | None
    held_out: Path
    recipes: tuple[Recipe, ...]
    limit: int = 64
    first: int = 0  # the first of the calibration queries, where a case draws others than the first ones


def weights(rank: int = 16, method: str = "output", **options: Any) -> Recipe:
    """Return the recipe of a patch of weights alone, or with entries beside them."""
    return Recipe(method=method, settings=Settings(rank), **{"dtype": "i8", **options})


def entries(count: int, **options: Any) -> Recipe:
    """Return the recipe of a patch of entries alone."""
    return Recipe(method="prefix", prefix=count, **{"dtype": "i8", "samples": 1, **options})


def task(name: str, new_tokens: int, inputs: int, recipes: tuple[Recipe, ...] = (entries(192),)) -> list[Case]:
    """Return a few-shot task with three disjoint draws of `inputs` inputs; every answer ends with its line."""
    ended = tuple(replace(one, stop=("\n",), max_new_tokens=new_tokens) for one in recipes)
    files = [TASKS / f"{name.partition('-')[0]}.{part}" for part in ("prompt.txt", "calibration.txt", "held-out.jsonl")]
    return [Case(f"{name}-{draw}", "gemma", *files, ended, inputs, inputs * (draw - 1)) for draw in (1, 2, 3)]


SHORT = {"max_new_tokens": 8}
INT4 = {"student_precision": "int4"}
CALIBRATED = {"student_precision": "int4-gptq"}
FOUR_BITS = {"dtype": "i4"}  # 90, 184 and 360 entries take the bytes of 48, 96 and 192 in int8
CASES = (
    Case("persona", "smollm2", DEMO / "pirate.txt", None, DEMO / "held-out.txt", (entries(ALL), weights())),
    Case("french", "smollm2", HERE / "french.txt", None, DEMO / "held-out.txt", (entries(ALL), weights())),
    Case("facts", "smollm2", HERE / "facts.txt", HERE / "facts-queries.txt", HERE / "facts-held-out.jsonl", (
        entries(48), entries(90, **FOUR_BITS), entries(ALL, **FOUR_BITS), entries(ALL), weights(),
    )),
    # The model wrote these queries itself: tp-export questions SMOLLM2 policy.txt policy-queries.txt --rounds 4
    Case("policy", "smollm2", HERE / "policy.txt", HERE / "policy-queries.txt", HERE / "policy-held-out.txt", (
        entries(48), entries(96), entries(192), entries(90, **FOUR_BITS), entries(184, **FOUR_BITS),
        entries(360, **FOUR_BITS), weights(prefix=96, samples=1), weights(samples=1), entries(96, restate=False),
    ), 80),
    Case("handbook", "smollm2", HERE / "handbook.txt", HERE / "handbook-queries.txt",
         HERE / "handbook-held-out.jsonl", (
        entries(192), entries(360, **FOUR_BITS), weights(samples=1),
    ), 80),
    *task("events", 50, 100),
    *task("home", 16, 100),
    *task("tickets", 6, 40),
    *task("events-int4", 50, 100, (
        entries(192, **CALIBRATED), weights(prefix=192, samples=1, **FOUR_BITS, **CALIBRATED),
        weights(32, prefix=150, samples=1, **FOUR_BITS, **CALIBRATED),
        weights(32, prefix=192, samples=1, **CALIBRATED),
    ))[:1],
    *task("home-int4", 16, 100, (entries(192, **INT4),))[:1],
    *task("tickets-int4", 6, 40, (entries(192, **INT4),))[:1],
    Case("translation", "gemma", HERE / "translation.txt", HERE / "translation-queries.txt",
         HERE / "translation-held-out.jsonl", (weights(method="vector", **SHORT), weights(**SHORT))),
    Case("operators", "gemma", HERE / "operators.txt", HERE / "operators-queries.txt",
         HERE / "operators-held-out.jsonl", (weights(method="vector", **SHORT), weights(**SHORT))),
)  # fmt: skip


def prompted_student(
    source: Source,
    model: Any,
    student: QuantisedStudent,
    context: str,
    answers: Mapping[str, str],
    recipe: Recipe,
    store: RolloutStore,
) -> dict[str, Any]:
    """Return what quantised weights keep of the right answers with the context itself in front of the questions."""
    limit, stop = recipe.max_new_tokens, recipe.stop
    asked = Prompting(source.codec, context)
    exactly = recorded_answers(dialogues_for(model, asked, list(answers), limit, stop=stop, store=store))
    prompts, expected = [asked.teacher(query) for query in answers], list(answers.values())
    exact = right_answers(source.codec, exactly, prompts, expected, stop, "answers, prompted")
    with as_student(student):
        quantised = torch_answers(source, model, None, limit, stop)
        found = right_answers(source.codec, quantised, prompts, expected, stop, f"answers, {student.precision}")
    kept, error = share_kept(exact, found)
    return {"prompted": float(exact.mean()), student.precision: float(found.mean()), "kept": kept, "kept_se": error}


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
        context = case.context.read_text(encoding="utf-8").rstrip("\r\n")
        fitted = load_questions(case.queries)[case.first : case.first + case.limit]
        held = load_questions(case.held_out)
        answers = load_answers(case.held_out)
        store = RolloutStore(args.out / f"{case.name}.jsonl", source.digest)
        (precision,) = {one.student_precision for one in case.recipes}
        student = student_for(source, model, precision)
        if student is not None:
            found = prompted_student(source, model, student, context, answers, case.recipes[0], store)
            print(json.dumps({"context": case.name, **found}), flush=True)
        for one in case.recipes:
            start = time.perf_counter()
            count = "all" if one.prefix == ALL else one.prefix
            name = f"{case.name}-{one.method}-r{one.settings.rank}-p{count}-{one.dtype}"
            name += "" if one.restate else "-not-restated"
            patch = make_patch(
                *(source, model, context, fitted, held, one), name=name, answers=answers, store=store, student=student
            )
            seconds = time.perf_counter() - start
            file = args.out / f"{name}.safetensors"
            patch.save(file)
            shown = {
                "patch": name,
                "context_tokens": len(source.codec.render(context, raw=True)),
                "megabytes": round(file.stat().st_size / 1e6, 2),
                "seconds": round(seconds),
                **(patch.config.fidelity or {}),
            }
            print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
