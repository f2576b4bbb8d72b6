"""`tp-export evaluate`: how much of a prompt's effect a patch has, on held-out queries."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .context import add_context_options, add_device_options, read_any_context, read_context, torch_device


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to the parser."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a patch on held-out queries",
        description="KL of the patched model to the prompted one, per completion token. Those it was fitted on "
        "are refused.",
    )
    parser.add_argument("src", metavar="SRC", help="a Hugging Face folder or a hub id")
    parser.add_argument("patch", metavar="PATCH", type=Path, help="the patch file")
    add_context_options(parser, required=False)
    add_device_options(parser)
    parser.add_argument(
        "--queries",
        type=Path,
        required=True,
        metavar="HELDOUT",
        help="queries the patch never saw; with expected answers in a .jsonl file of {query, answer}, accuracy as well",
    )
    parser.add_argument("--max-new-tokens", type=int, default=48, help="length of the teacher's answers (default 48)")
    parser.add_argument(
        "--runtime",
        type=Path,
        metavar="MODEL_DIR",
        help="run the student as this exported folder under tp_runtime, so that export and precision count",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the figures."""
    from tp_runtime.patch import Patch
    from tp_runtime.session import Graph, ModelFolder, check_base

    from ..measure import (
        measure_accuracy,
        measure_fidelity,
        runtime_answers,
        runtime_student,
        torch_answers,
        torch_student,
    )
    from ..progress import bar, clock
    from ..queries import check_unfitted, load_answers, load_questions
    from ..rollout import context_digest, dialogues_for
    from ..source import load_model, open_source

    patch = Patch.load(args.patch)
    # A patch that only repairs a quantised base has no prompt; what it is held against is the float32 base.
    context = read_any_context(args) if patch.config.context_digest == "" else read_context(args)
    queries, answers = load_questions(args.queries), load_answers(args.queries)
    check_unfitted(queries, (patch.config.calibration or {}).get("query_digests", ()))
    source = open_source(args.src)
    if context is not None and patch.config.context_digest not in ("", context_digest(context)):
        print("note: the patch was fitted on another prompt than this one", file=sys.stderr)
    graph = None if args.runtime is None else Graph(ModelFolder.open(args.runtime))
    check_base(patch, source.name, source.digest, "fp32" if graph is None else graph.folder.precision)
    if graph is not None:
        graph.bind(patch)  # a patch that does not fit is found before the rollout
    with clock("load weights"):
        model = load_model(source, torch_device(args.device), offload=args.offload)
    dialogues = dialogues_for(source, model, context, queries, args.max_new_tokens)
    if graph is None:
        students = torch_student(model), torch_student(model, patch)
    else:
        students = runtime_student(graph), runtime_student(graph, patch)
    with bar("held-out fidelity", len(dialogues), "query") as shown:
        figures = measure_fidelity(dialogues, torch_student(model), *students, progress=shown.update).to_dict()
    if answers and context is not None:
        limit = args.max_new_tokens
        prompted = torch_answers(source, model, None, limit)
        if graph is None:
            ways = prompted, torch_answers(source, model, patch, limit)
        else:
            ways = (
                runtime_answers(source, graph, None, limit),
                runtime_answers(source, graph, patch, limit),
            )
        figures |= measure_accuracy(source, context, answers, prompted, *ways).to_dict()
    if args.json:
        print(json.dumps({"patch": patch.name, "identity": patch.identity, **figures}))
    else:
        for key, value in figures.items():
            print(f"{key:24} {value:g}")
    return 0
