"""Counts how many completions under random JSON schemas compile, end by themselves and are valid, on a real model.

    python benchmarks/schemas.py MODEL_DIR [--count 200] [--temperature 1] [--tokens 300] [--kinds KIND ...]

MODEL_DIR is an exported folder. The schemas are of the ten kinds of `random_schemas.py`, the same number of each. The
model is asked to write a value for each schema, which stands in the prompt as an application would put it there. What
ends is judged by the package jsonschema. The script prints a row for each kind, every value that is not valid, and the
mean number of tokens; it fails if a value that ended is not valid.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from typing import Any

import jsonschema
from random_schemas import KINDS, random_schema

from tp_runtime import PatchedModel
from tp_runtime.errors import RequestError

PROMPT = "Write one JSON value that this JSON schema accepts, and nothing else.\n\n"


def main() -> int:
    """Run, print and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    model = PatchedModel.from_pretrained(args.model, "cpu")
    total: Counter[str] = Counter()
    print("| kind | schemas | compiled | ended | valid | tokens of one that ended |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    start = time.perf_counter()
    for kind in args.kinds:
        counts = run_kind(model, kind, args)
        total += counts
        print(f"| {kind} | {cells(counts)} |", flush=True)
    print(f"| all | {cells(total)} |")
    print(f"\n{time.perf_counter() - start:.0f} s")
    return 0 if total["valid"] == total["ended"] else 1


def run_kind(model: PatchedModel, kind: str, args: argparse.Namespace) -> Counter[str]:
    """Return the counts of one kind of schema."""
    counts: Counter[str] = Counter()
    grammars = model.codec.grammars(model.graph.folder.vocab_size)
    schemas: list[dict[str, Any]] = []
    for number in range(args.count // len(KINDS)):
        schema = random_schema(kind, args.seed + number)
        counts["schemas"] += 1
        try:
            grammars.compile(json_schema=schema)
        except RequestError as error:
            print(f"refused: {error}", file=sys.stderr)
        else:
            schemas.append(schema)
    counts["compiled"] = len(schemas)
    if not schemas:
        return counts
    results = model.complete(
        [PROMPT + json.dumps(schema, ensure_ascii=False) for schema in schemas],
        rows=args.rows,
        json_schema=schemas,
        max_new_tokens=args.tokens,
        temperature=args.temperature,
        seed=[args.seed + number for number in range(len(schemas))],
    )
    for schema, result in zip(schemas, results, strict=True):
        if result.finish_reason == "eos":
            counts["ended"] += 1
            counts["tokens"] += len(result.token_ids)
            if is_valid(schema, result.text):
                counts["valid"] += 1
            else:
                print(f"not valid: {result.text}\n{json.dumps(schema, ensure_ascii=False)}")
        else:
            print(f"{kind}, {result.finish_reason}: {result.text[-80:]!r}", file=sys.stderr)
    return counts


def is_valid(schema: dict[str, Any], text: str) -> bool:
    """Return whether a text is a JSON value that the schema accepts, formats included."""
    # A checker of all drafts would judge "time" by draft 3, which has no time zone.
    formats = jsonschema.Draft202012Validator.FORMAT_CHECKER
    validator = jsonschema.Draft202012Validator(schema, format_checker=formats)
    try:
        return bool(validator.is_valid(json.loads(text)))
    except ValueError:
        return False


def cells(counts: Counter[str]) -> str:
    """Return the counts as the cells of a table."""
    mean = counts["tokens"] / counts["ended"] if counts["ended"] else 0
    return " | ".join(str(counts[name]) for name in ("schemas", "compiled", "ended", "valid")) + f" | {mean:.0f}"


if __name__ == "__main__":
    sys.exit(main())
