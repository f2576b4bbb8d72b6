"""`tp-export report`: write one page on the effect, the fidelity and the cost of a patch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, TypeVar

from tp_runtime.errors import CalibrationError, PatchFormatError

from .options import (
    MEASURED_BEHIND,
    add_answer_length,
    add_device_option,
    add_source,
    add_stop,
    add_system_messages,
    check_measurable,
    given,
    load_weights,
    open_graph,
    patch_system_messages,
    read_prompt_file,
    require_at_least,
    require_folder_of,
    stop_strings,
    valid_text,
)

T = TypeVar("T")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "report",
        help="write a self-contained HTML page on a patch, or on several patches and their sum",
        description="Measure patches against the prompts that they replace, and write one HTML page. With several "
        "patches, pass --prompt or --prompt-file once for each patch, in the order of the patches. Pass --queries and "
        "--calibration once for all patches or once for each. The command prints the path of the page.",
    )
    add_source(parser)
    parser.add_argument("patches", metavar="PATCH", type=Path, nargs="+", help="the patch files")
    # Both options share one list, so that their order on the command line is kept.
    prompts: dict[str, Any] = {"dest": "prompts", "action": "append"}
    parser.add_argument("--prompt", metavar="TEXT", type=str, help="the prompt of a patch", **prompts)
    parser.add_argument(
        "--prompt-file", metavar="FILE", type=Path, help="a UTF-8 file with the prompt of a patch", **prompts
    )
    parser.add_argument(
        "--queries",
        type=Path,
        action="append",
        required=True,
        metavar="HELDOUT",
        help="a file of queries that the patch was not fitted on; for a .jsonl file of {query, answer} the page also "
        "shows how many right answers are kept",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        action="append",
        metavar="FILE",
        help="the file of queries that the patch was fitted on, for the baselines (default: the built-in questions)",
    )
    parser.add_argument(
        "--runtime",
        type=Path,
        metavar="MODEL_DIR",
        help="the exported folder to measure times and fidelity with (default: fidelity in torch, no times)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page to write (default report.html)",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object instead of the path")
    parser.add_argument("--store", action="store_true", help="store a summary in the descriptions of the patch files")
    add_answer_length(parser)
    add_stop(parser, "the stop strings in each patch file")
    add_system_messages(parser, MEASURED_BEHIND)
    parser.add_argument(
        "--long",
        type=int,
        default=256,
        metavar="N",
        help="the largest number of tokens of the long completions (default 256; 0 leaves them out)",
    )
    parser.add_argument(
        "--baselines",
        default="all",
        metavar="LIST",
        help="the methods to fit on the same rows for comparison, separated by commas, or all (default), or none",
    )
    parser.add_argument(
        "--frontier",
        default="",
        metavar="N,N,...",
        help="draw fidelity against bytes for these numbers of KV entries per head, each with and without weights, and "
        "against shorter prompts; this takes several fits",
    )
    parser.add_argument(
        "--frontier-ranks",
        default="",
        metavar="N,N,...",
        help="the ranks of the weights without entries in that plot (default: the rank of the patch)",
    )
    add_device_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure the patches, write the page and print its path."""
    import matplotlib  # noqa: F401 - if it is missing, the error comes before the minutes of work

    from tp_runtime.patch import ADDS_TO_WEIGHTS, BEFORE_SYSTEM, PATCH_FILE, Patch
    from tp_runtime.storage import check_output_file

    from ..queries import load_answers, load_questions
    from ..report import (
        METHODS,
        PAGE,
        Setup,
        Subject,
        check_long,
        describe_report,
        fitted_queries,
        measure_composition,
        measure_patch,
        store_summary,
        write_page,
    )
    from ..source import open_source

    methods, frontier = _methods(args.baselines, METHODS), _numbers("--frontier", args.frontier)
    ranks = _numbers("--frontier-ranks", args.frontier_ranks)
    stop_strings(args.stop)  # an empty one is refused before anything is read
    require_at_least("--max-new-tokens", args.max_new_tokens, 1)
    require_at_least("--long", args.long, 0)
    require_folder_of("-o", args.output)
    prompt_files = [prompt for prompt in args.prompts or [] if isinstance(prompt, Path)]
    texts = [*prompt_files, *args.queries, *(args.calibration or []), *given(args.system_messages)]
    check_output_file(args.output, PAGE, [args.src, *args.patches, *texts])
    if args.store:
        for file in args.patches:
            check_output_file(file, PATCH_FILE)
    count = len(args.patches)
    prompts = _one_each("--prompt", args.prompts or [], count, shared=False)
    queries = _one_each("--queries", args.queries, count)
    calibration = _one_each("--calibration", args.calibration or [None], count)
    source = open_source(args.src)
    graph = open_graph(args.runtime)
    subjects = []
    for file, prompt, held_out, fitted in zip(args.patches, prompts, queries, calibration, strict=True):
        patch = Patch.load(file)
        context = read_prompt_file(prompt) if isinstance(prompt, Path) else valid_text("--prompt", prompt)
        held = load_questions(held_out)
        check_measurable(patch, file.name, context, held, source, graph)
        known = fitted_queries(patch, load_questions(fitted))
        stop = stop_strings(args.stop, patch)
        systems = patch_system_messages(args, patch)
        subjects.append(Subject(patch, file, context, held, known, load_answers(held_out), stop, systems))
    if len({subject.patch.identity for subject in subjects}) < count:
        raise PatchFormatError("the same patch is given twice", field="PATCH", got=", ".join(map(str, args.patches)))
    if sum(subject.patch.prefix is not None for subject in subjects) > 1:
        raise CalibrationError(
            f"this page shows the sum of its patches, and a patch with entries adds {ADDS_TO_WEIGHTS}",
            field="PATCH",
            got=", ".join(map(str, args.patches)),
            wanted="at most one patch with entries",
            fix="make a page for each patch",
        )
    alone = [str(subject.file) for subject in subjects if subject.systems is None]
    if alone and len(alone) < count:  # without the option; given messages are those of every patch
        raise CalibrationError(
            f"this page asks the queries of each patch under the sum of its patches, but {BEFORE_SYSTEM}",
            field="--system-messages",
            got=f"none, so that the queries of {', '.join(alone)} have no system message",
            wanted="a file of system messages for the queries of every patch",
            fix="pass it if all patches were made with --before-system, or make a page for each patch",
        )
    model = load_weights(source, args)
    setup = Setup(source, model, graph, args.max_new_tokens, args.long, methods, frontier, ranks)
    for subject in subjects:
        check_long(setup, subject)
    reports = [measure_patch(setup, subject) for subject in subjects]
    composition = measure_composition(setup, subjects) if count > 1 else []
    report = describe_report(setup, reports, composition)
    write_page(report, args.output)
    if args.store:
        for subject, measured in zip(subjects, reports, strict=True):
            store_summary(subject.file, subject.patch, measured)
    if args.json:
        print(json.dumps(report.to_dict()))
    else:
        print(args.output)
    return 0


def _methods(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    if text in ("all", "none"):
        return known if text == "all" else ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise CalibrationError(
            "the method is unknown",
            field="--baselines",
            got=", ".join(map(repr, unknown)),
            wanted=f"{', '.join(known)}, all or none",
        )
    return names


def _numbers(field: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise CalibrationError(
            "the value is not a list of positive integers", field=field, got=repr(text), wanted="such as 4,16,64"
        )
    return tuple(sorted({int(part) for part in parts}))


def _one_each(field: str, given: list[T], count: int, *, shared: bool = True) -> list[T]:
    """Return one value for each of `count` patches; if `shared`, a single value counts for all of them."""
    if shared and len(given) == 1:
        return given * count
    if len(given) != count:
        raise CalibrationError(
            "the number of values differs from the number of patches",
            field=field,
            got=len(given),
            wanted=f"{count}, in the order of the patches" + (", or 1 for all" if shared and count > 1 else ""),
        )
    return given
