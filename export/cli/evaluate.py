"""`tp-export evaluate`: measure on held-out queries how much of a prompt's effect a patch has."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .options import (
    MEASURED_BEHIND,
    add_answer_length,
    add_context_options,
    add_device_options,
    add_source,
    add_stop,
    add_system_messages,
    check_measurable,
    load_weights,
    open_graph,
    patch_system_messages,
    read_any_context,
    read_context,
    require_at_least,
    stop_strings,
)


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a patch on held-out queries",
        description="Measure the KL divergence of the patched model from the prompted one, in nats per completion "
        "token, over all tokens and at the first token of the answers. Shares come with their bootstrap standard error "
        "over the queries (_se). The command refuses queries that the patch was fitted on.",
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
        "also measures accuracy: with stop strings the share of answers that equal the expected one, without them the "
        "share that contain it",
    )
    add_answer_length(parser)
    add_stop(parser, "the stop strings in the patch file")
    add_system_messages(parser, MEASURED_BEHIND)
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
        recorded_answers,
        runtime_answers,
        torch_answers,
    )
    from ..progress import bar
    from ..queries import load_answers, load_questions
    from ..rollout import Context, Prompting, dialogues_for
    from ..source import open_source

    require_at_least("--max-new-tokens", args.max_new_tokens, 1)
    patch = Patch.load(args.patch)
    stop = stop_strings(args.stop, patch)
    systems = patch_system_messages(args, patch)
    # A patch that only repairs a quantised base has no prompt, so it is compared with the float32 base.
    context = read_any_context(args) if patch.config.context_digest == "" else read_context(args)
    queries, known = load_questions(args.queries), load_answers(args.queries)
    answers = {query: known[query] for query in queries if query in known}
    source = open_source(args.src)
    graph = open_graph(args.runtime)
    check_measurable(patch, "the patch", context, queries, source, graph)
    model = load_weights(source, args)
    limit = args.max_new_tokens
    asked = Prompting(source.codec, context, systems.held_out if systems else ())
    cached = None if context is None else Context.of(model, asked, asked.pairs(queries)).cached
    dialogues = dialogues_for(model, asked, queries, limit, stop=stop, cached=cached)

    def student(under: Patch | None) -> Student:
        return TorchStudent(model, under) if graph is None else RuntimeStudent(graph, under)

    def answerer(under: Patch | None) -> Answers:
        if graph is None:
            return torch_answers(source, model, under, limit, stop)
        return runtime_answers(source, graph, under, limit, stop)

    with bar("held-out fidelity", len(dialogues), "query") as shown:
        teacher = TorchStudent(model, cached=cached)
        fidelity = measure_fidelity(dialogues, teacher, student(None), student(patch), shown.update)
    figures = fidelity.to_dict()
    if fidelity.gap_closed_first is None:
        _note(
            f"the prompt has no effect on the first token of the answers (KL {fidelity.kl_unpatched_first:.1e}), so "
            "there is no gap_closed_first"
        )
    if answers and context is not None:
        accuracy = measure_accuracy(asked, answers, recorded_answers(dialogues), answerer(None), answerer(patch), stop)
        figures |= accuracy.to_dict()
        if accuracy.kept is None:
            _note("the prompted model answers no question correctly, so there is no share of answers kept")
    if args.json:
        print(json.dumps({"patch": patch.name, "identity": patch.identity, **figures}))
    else:
        for key, value in figures.items():
            print(f"{key:26} {value:g}")
    return 0


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
