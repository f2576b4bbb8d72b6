"""`tp-export questions`: have the base model write calibration queries about a document (self-study)."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from tp_runtime.errors import CalibrationError

from .context import add_device_options, read_prompt_file, torch_device


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to the parser."""
    parser = subparsers.add_parser(
        "questions",
        help="have the model write questions about a document",
        description="Put every line of a document to the model, which has all of it in context, and ask for questions "
        "that the line answers. The file is for `tp-export patch --queries`: a patch knows a fact as far as it was "
        "fitted on questions about it. Read it through: a small model also writes nonsense. Prints the file.",
    )
    parser.add_argument("src", metavar="SRC", help="a Hugging Face folder or a hub id")
    parser.add_argument("document", metavar="DOCUMENT", type=Path, help="UTF-8 text: facts, rules, prose")
    parser.add_argument("out", metavar="OUT.txt", type=Path, help="one question a line")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="times through the document (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other questions (default 0)")
    add_device_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the file."""
    from tp_runtime.storage import atomic_file

    from ..progress import bar, clock
    from ..queries import statements, write_questions
    from ..source import load_model, open_source

    if args.rounds < 1:
        raise CalibrationError("too small", field="--rounds", got=args.rounds, wanted="at least 1")
    if not args.out.resolve().parent.is_dir():
        raise CalibrationError("no such folder", field="OUT", got=str(args.out.parent), fix="make it first")
    document = read_prompt_file(args.document)
    source = open_source(args.src)
    with clock("load weights"):
        model = load_model(source, torch_device(args.device), offload=args.offload)
    with bar("questions", args.rounds * len(statements(document)), "answer") as shown:
        questions = write_questions(source, model, document, args.rounds, seed=args.seed, progress=shown.update)
    with atomic_file(args.out) as temporary:
        temporary.write_text("".join(f"{question}{os.linesep}" for question in questions), encoding="utf-8")
    print(args.out)
    return 0
