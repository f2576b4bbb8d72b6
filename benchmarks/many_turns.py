"""Measures how a patch holds over a long dialogue: the gap closed at each of six turns, up to 2,000 tokens of text.

    python benchmarks/many_turns.py SRC PATCH --prompt-file FILE --queries HELD_OUT [--dialogues N]

A folded key gives an entry its mass for queries as they are near the beginning of a text. Far into a dialogue the
rotary angles have moved on, so this is where a fold would decay. Each user turn is a passage of neutral prose with a
held-out question at its end. The prompted model answers, and its answers stay in the dialogue. The script prints one
line of JSON for each turn.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path

import torch

from tp_export.measure import TorchStudent
from tp_export.queries import load_questions
from tp_export.rollout import Context, Ending, Prompting, complete
from tp_export.source import load_model, open_source
from tp_runtime.patch import Patch

TURNS, PASSAGE, ANSWER = 6, 260, 48  # turns; tokens of a passage; tokens of an answer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("src")
    parser.add_argument("patch", type=Path)
    parser.add_argument("--prompt-file", type=Path, required=True)
    parser.add_argument("--queries", type=Path, required=True)
    parser.add_argument("--dialogues", type=int, default=2)
    args = parser.parse_args()
    source = open_source(args.src)
    model, codec = load_model(source), source.codec
    prompt = args.prompt_file.read_text(encoding="utf-8").rstrip("\r\n")
    queries = load_questions(args.queries)
    asked = Prompting(codec, prompt)
    context = Context.of(model, asked, asked.pairs(queries))
    students = {
        "teacher": TorchStudent(model, cached=context.cached),
        "unpatched": TorchStudent(model),
        "patched": TorchStudent(model, Patch.load(args.patch)),
    }
    lines = (files("tp_export.data") / "neutral-passages.txt").read_text(encoding="utf-8").splitlines()
    prose = codec.render(" ".join(line for line in lines if not line.startswith("#")), raw=True)
    kl: dict[int, dict[str, list[torch.Tensor]]] = {turn: {"unpatched": [], "patched": []} for turn in range(TURNS)}
    lengths: dict[int, int] = {}
    for number in range(args.dialogues):
        messages: list[dict[str, str]] = []
        for turn in range(TURNS):
            start = (number * TURNS + turn) * PASSAGE % max(1, len(prose) - PASSAGE)
            passage = codec.decode(prose[start : start + PASSAGE])
            question = queries[(number * TURNS + turn) % len(queries)]
            messages.append({"role": "user", "content": f"{passage}\n\n{question}"})
            asked = {"teacher": tuple(codec.render(messages, prompt)), "student": tuple(codec.render(messages))}
            (answer,) = complete(model, [asked["teacher"]], ANSWER, Ending.of(codec), prefix=context.cached)
            lengths[turn] = len(asked["student"])
            logits = {}
            for name, student in students.items():
                ids = asked["teacher" if name == "teacher" else "student"]
                logits[name] = student((*ids, *answer[:-1]), len(ids) - 1).float().log_softmax(-1)
            wanted = logits["teacher"]
            for name, rows in kl[turn].items():
                rows.append((wanted.exp() * (wanted - logits[name])).sum(-1))
            messages.append({"role": "assistant", "content": codec.decode(answer)})
    for turn, found in kl.items():
        mean = {name: float(torch.cat(rows).mean()) for name, rows in found.items()}
        line = {
            "turn": turn + 1,
            "tokens": lengths[turn],
            **{f"kl_{name}": round(value, 4) for name, value in mean.items()},
            "gap_closed": round(1 - mean["patched"] / mean["unpatched"], 4),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
