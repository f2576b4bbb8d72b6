"""`tp-export questions`: let the base model write calibration queries about a document (self-study)."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .options import add_device_options, add_source, load_weights, read_prompt_file, require_at_least, require_folder_of


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "questions",
        help="let the model write questions about a document",
        description="Ask the model, with the whole document in context, for questions that each line of the document "
        "answers. The file is meant for `tp-export patch --queries`: a patch knows a fact only as far as it was fitted "
        "on questions about it. Check the questions before you use them, since a small model also writes nonsense. The "
        "command prints the path of the file.",
    )
    add_source(parser)
    parser.add_argument("document", metavar="DOCUMENT", type=Path, help="a UTF-8 text file with facts, rules or prose")
    parser.add_argument("out", metavar="OUT.txt", type=Path, help="the new file to write, with one question per line")
    parser.add_argument(
        "--rounds", type=int, default=6, metavar="N", help="the number of passes over the document (default 6)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the seed of the sampled questions (default 0)")
    add_device_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the questions and print the file's path."""
    from tp_runtime.storage import atomic_file, check_output_file

    from ..progress import bar
    from ..queries import statements, write_questions
    from ..source import open_source

    require_at_least("--rounds", args.rounds, 1)
    require_folder_of("OUT", args.out)
    # No file is replaced: the text is meant to be corrected by hand, and nothing in it tells whose it is.
    check_output_file(args.out, inputs=[args.src, args.document])
    document = read_prompt_file(args.document)
    source = open_source(args.src)
    model = load_weights(source, args)
    with bar("questions", args.rounds * len(statements(document)), "answer") as shown:
        questions = write_questions(source, model, document, args.rounds, seed=args.seed, progress=shown.update)
    with atomic_file(args.out, inputs=[args.src, args.document]) as temporary:
        temporary.write_text("".join(f"{question}{os.linesep}" for question in questions), encoding="utf-8")
    print(args.out)
    return 0
