"""Measures what a constraint costs per token, on this machine, apart from the model: no graph is run.

    python benchmarks/constraint_cost.py FOLDER [FOLDER ...]

FOLDER is an exported folder or a transformers folder; only its tokenizer and its vocabulary's size are read. For each
folder the script replays texts that satisfy their schemas, token by token, as the sampler does: it brings the
constraint's state forward, asks for forced ids, and asks whether the pick is allowed. Where a pick is refused, the
mask is computed and applied to the logits in addition. The first replay builds the lexer's states, which later
completions of a service have not got either, so it is the one that counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tp_runtime.generation import masked
from tp_runtime.grammar import Grammars
from tp_runtime.text import TOKENIZER_FILES, TextCodec

TEXT = "A longer remark, with numbers such as 12 or 3.5, and a name: Žofia. It has 日本 in it, and ends here. "
PERSON = {"name": "Ann Lee", "age": 33, "email": "ann.lee@example.com", "tags": ["red", "blue"], "notes": TEXT}
PERSON_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        "notes": {"type": "string"},
    },
    "required": ["name", "age", "notes"],
    "additionalProperties": False,
}
NODE = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#"}}},
}

# What is replayed: a schema and a value that satisfies it.
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "a person": (PERSON_SCHEMA, PERSON),
    "a list of persons": ({"type": "array", "items": PERSON_SCHEMA}, [PERSON] * 3),
    "a tree": (NODE, {"text": "a", "children": [{"text": "b c", "children": []}, {"text": TEXT, "children": []}]}),
    "free JSON": ({"type": "object"}, {"anything": [1, 2.5, None, True], "more": {"text": TEXT}}),
    "patterns": (
        {"type": "object", "additionalProperties": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}},
        {f"key {number}": f"AB-{number:04}" for number in range(12)},
    ),
    "60 optional properties": (
        {"type": "object", "properties": {f"property{n}": {"type": "integer"} for n in range(60)}},
        {f"property{n}": n for n in range(0, 60, 3)},
    ),
}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    for folder in args.folders:
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
        codec = TextCodec.from_files(files, str(folder))
        width = int(json.loads(files["config.json"])["vocab_size"])
        grammars = codec.grammars(width)
        build, _ = timed(lambda grammars=grammars: grammars.compile(regex="a"))
        print(f"\n{folder.name}: {width:,} logits; the vocabulary's tree is built once, in {build:.1f} s\n")
        print("| schema | compile, ms | tokens | a pick that is allowed, ms | one that is refused, ms more |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for name, (schema, value) in CASES.items():
            print(f"| {name} | {row(grammars, codec, width, schema, value)} |", flush=True)


def row(grammars: Grammars, codec: TextCodec, width: int, schema: dict[str, Any], value: Any) -> str:
    """Return the figures of one case as the cells of a table: means over the tokens, and the largest value."""
    compile_s, grammar = timed(lambda: grammars.compile(json_schema=schema))
    ids = codec._tokenizer.encode(json.dumps(value, ensure_ascii=False), add_special_tokens=False).ids
    constraint = grammar.constraint()
    logits = np.random.default_rng(0).standard_normal(width, dtype=np.float32)
    picks, masks = [], []

    def pick(at: int) -> bool:
        constraint.follow(ids[:at])
        constraint.forced()
        return bool(constraint.allows(ids[at]))

    for at in range(len(ids)):
        seconds, allowed = timed(lambda at=at: pick(at))
        assert allowed, (at, codec.decode(ids[: at + 1]))
        picks.append(1000 * seconds)
    constraint = grammar.constraint()
    for at in range(len(ids)):
        pick(at)
        seconds, _ = timed(lambda: masked(logits, constraint.allowed()))
        masks.append(1000 * seconds)
    cells = [f"{np.mean(each):.3f} (at most {np.max(each):.2f})" for each in (picks, masks)]
    return f"{1000 * compile_s:.1f} | {len(ids)} | {cells[0]} | {cells[1]}"


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of the processor that a call takes, and what it returns: other programs do not count."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


if __name__ == "__main__":
    main()
