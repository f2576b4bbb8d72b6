"""`tp-export report`: one page on what a patch does, keeps and costs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, TypeVar

from tp_runtime.errors import CalibrationError, PatchFormatError

from .context import add_device_option, read_prompt_file, torch_device

T = TypeVar("T")
_METHODS = ("steering", "isotropic", "vector", "output", "matrix")


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to the parser."""
    parser = subparsers.add_parser(
        "report",
        help="one self-contained HTML page on a patch, or on several and their sum",
        description="Measure patches against the prompts they stand for, and write one HTML page. With several "
        "patches, give --prompt or --prompt-file once for each, in their order; --queries and --calibration once for "
        "all or once for each. Prints the file.",
    )
    parser.add_argument("src", metavar="SRC", help="a Hugging Face folder or a hub id")
    parser.add_argument("patches", metavar="PATCH", type=Path, nargs="+", help="the patch files")
    # One list for both options, so that their order on the command line is kept.
    prompts: dict[str, Any] = {"dest": "prompts", "action": "append"}
    parser.add_argument("--prompt", metavar="TEXT", type=str, help="the prompt of a patch", **prompts)
    parser.add_argument("--prompt-file", metavar="FILE", type=Path, help="the same, from a UTF-8 file", **prompts)
    parser.add_argument(
        "--queries", type=Path, action="append", required=True, metavar="HELDOUT", help="queries the patch never saw"
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        action="append",
        metavar="FILE",
        help="the file with the queries it was fitted on, for the baselines (default: built in)",
    )
    parser.add_argument("--runtime", type=Path, metavar="MODEL_DIR", help="the exported folder: times, and fidelity")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page")
    parser.add_argument("--json", action="store_true", help="print every figure as one JSON object")
    parser.add_argument("--store", action="store_true", help="put a summary into the patch files' descriptions")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="length of the teacher's answers (default 48)")
    parser.add_argument(
        "--long", type=int, default=256, metavar="N", help="length of the long completions (default 256; 0: none)"
    )
    parser.add_argument(
        "--baselines",
        default=",".join(_METHODS),
        metavar="LIST",
        help="methods to fit on the same rows (default: all), or none",
    )
    parser.add_argument(
        "--frontier",
        default="",
        metavar="N,N,...",
        help="draw fidelity against bytes, with these numbers of KV entries a head beside the weights (several fits)",
    )
    add_device_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures, draws, writes."""
    import matplotlib  # noqa: F401 - missing, it is found before the minutes of work

    from tp_runtime.patch import Patch
    from tp_runtime.session import Graph, ModelFolder, check_base

    from ..progress import clock
    from ..queries import check_unfitted, load_questions
    from ..report import about, compare, measure, page, store
    from ..rollout import context_digest
    from ..source import load_model, open_source

    methods, frontier = _methods(args.baselines), _entries(args.frontier)
    for field, value, least in (("--max-new-tokens", args.max_new_tokens, 1), ("--long", args.long, 0)):
        if value < least:
            raise CalibrationError("too small", field=field, got=value, wanted=f"at least {least}")
    if not args.output.resolve().parent.is_dir():
        raise CalibrationError("no such folder", field="-o", got=str(args.output.parent), fix="make it first")
    count = len(args.patches)
    prompts = _one_each("--prompt", args.prompts or [], count, shared=False)
    queries = _one_each("--queries", args.queries, count)
    calibration = _one_each("--calibration", args.calibration or [None], count)
    source = open_source(args.src)
    graph = None if args.runtime is None else Graph(ModelFolder.open(args.runtime))
    subjects = []
    for file, prompt, held_out, fitted in zip(args.patches, prompts, queries, calibration, strict=True):
        patch = Patch.load(file)
        context = read_prompt_file(prompt) if isinstance(prompt, Path) else prompt
        held = load_questions(held_out)
        check_unfitted(held, (patch.config.calibration or {}).get("query_digests", ()))
        if patch.config.context_digest not in ("", context_digest(context)):
            print(f"note: {file.name} was fitted on another prompt than the one given", file=sys.stderr)
        check_base(patch, source.name, source.digest, "fp32" if graph is None else graph.folder.precision)
        if graph is not None:
            graph.bind(patch)  # a patch that does not fit is found before the rollout
        known = compare.fitted_queries(patch, load_questions(fitted))
        subjects.append(measure.Subject(patch, file, context, held, known))
    if len({subject.patch.identity for subject in subjects}) < count:
        raise PatchFormatError("the same patch twice", field="PATCH", got=", ".join(map(str, args.patches)))
    if sum(subject.patch.prefix is not None for subject in subjects) > 1:
        raise CalibrationError(
            "patches with KV prefixes cannot be added, and this page shows their sum",
            field="PATCH",
            got=", ".join(map(str, args.patches)),
            wanted="at most one patch with a KV prefix",
            fix="make a page for each",
        )
    with clock("load weights"):
        model = load_model(source, torch_device(args.device))
    setup = measure.Setup(source, model, graph, args.max_new_tokens, args.long, methods, frontier)
    for subject in subjects:
        measure.check_long(setup, subject)
    reports = [measure.measure_patch(setup, subject) for subject in subjects]
    composition = measure.measure_composition(setup, subjects) if count > 1 else []
    report = about.describe(setup, reports, composition)
    page.write(report, args.output)
    if args.store:
        for subject, measured in zip(subjects, reports, strict=True):
            store.store(subject.file, subject.patch, measured)
    if args.json:
        print(json.dumps(report.to_dict()))
    else:
        print(args.output)
    return 0


def _methods(text: str) -> tuple[str, ...]:
    names = () if text == "none" else tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name not in _METHODS]
    if unknown:
        raise CalibrationError(
            "unknown method",
            field="--baselines",
            got=", ".join(map(repr, unknown)),
            wanted=f"{', '.join(_METHODS)}, or none",
        )
    return names


def _entries(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise CalibrationError("not numbers of entries", field="--frontier", got=repr(text), wanted="such as 4,16,64")
    return tuple(sorted({int(part) for part in parts}))


def _one_each(field: str, given: list[T], count: int, *, shared: bool = True) -> list[T]:
    """As many as there are patches; one may stand for all where `shared`."""
    if shared and len(given) == 1:
        return given * count
    if len(given) != count:
        raise CalibrationError(
            "not one for each patch",
            field=field,
            got=len(given),
            wanted=f"{count}, in the order of the patches" + (", or 1 for all" if shared and count > 1 else ""),
        )
    return given
