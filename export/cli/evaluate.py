"""`tp-export evaluate`: measure on held-out queries how much of a prompt's effect a patch has."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .options import (
    add_answer_length,
    add_context_options,
    add_device_options,
    add_source,
    check_measurable,
    load_weights,
    open_graph,
    read_any_context,
    read_context,
    require_at_least,
)


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a patch on held-out queries",
        description="Measure the KL divergence of the patched model from the prompted one, in nats per completion "
        "token. The command refuses queries that the patch was fitted on.",
    )
    add_source(parser)
    parser.add_argument("patch", metavar="PATCH", type=Path, help="the patch file")
    add_context_options(parser)
    add_device_options(parser)
    parser.add_argument(
        "--queries",
        type=Path,
        required=True,
        metavar="HELDOUT",
        help="a file of queries that the patch was not fitted on; for a .jsonl file of {query, answer} the command "
        "also measures accuracy",
    )
    add_answer_length(parser)
    parser.add_argument(
        "--runtime",
        type=Path,
        metavar="MODEL_DIR",
        help="run the student with tp_runtime on this exported folder, so that the figures include the effect of the "
        "export and of its precision",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the lines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure the patch and print the figures."""
    from tp_runtime.patch import Patch

    from ..measure import (
        Answers,
        RuntimeStudent,
        Student,
        TorchStudent,
        measure_accuracy,
        measure_fidelity,
        runtime_answers,
        torch_answers,
    )
    from ..progress import bar
    from ..queries import load_answers, load_questions
    from ..rollout import dialogues_for
    from ..source import open_source

    require_at_least("--max-new-tokens", args.max_new_tokens, 1)
    patch = Patch.load(args.patch)
    # A patch that only repairs a quantised base has no prompt, so it is compared with the float32 base.
    context = read_any_context(args) if patch.config.context_digest == "" else read_context(args)
    queries, answers = load_questions(args.queries), load_answers(args.queries)
    source = open_source(args.src)
    graph = open_graph(args.runtime)
    check_measurable(patch, "the patch", context, queries, source, graph)
    model = load_weights(source, args)
    limit = args.max_new_tokens
    dialogues = dialogues_for(source, model, context, queries, limit)

    def student(under: Patch | None) -> Student:
        return TorchStudent(model, under) if graph is None else RuntimeStudent(graph, under)

    def answerer(under: Patch | None) -> Answers:
        if graph is None:
            return torch_answers(source, model, under, limit)
        return runtime_answers(source, graph, under, limit)

    with bar("held-out fidelity", len(dialogues), "query") as shown:
        fidelity = measure_fidelity(dialogues, TorchStudent(model), student(None), student(patch), shown.update)
    figures = fidelity.to_dict()
    if answers and context is not None:
        prompted = torch_answers(source, model, None, limit)
        figures |= measure_accuracy(source, context, answers, prompted, answerer(None), answerer(patch)).to_dict()
    if args.json:
        print(json.dumps({"patch": patch.name, "identity": patch.identity, **figures}))
    else:
        for key, value in figures.items():
            print(f"{key:24} {value:g}")
    return 0
