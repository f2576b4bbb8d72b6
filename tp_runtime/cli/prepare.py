"""`tp-runtime prepare`: bake a model folder's graph for this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..session import PREPARED, ModelFolder
from .printing import note, size


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to the parser."""
    parser = subparsers.add_parser(
        "prepare",
        help="pack a model's weights for this machine, once",
        description="Write the graph as this machine's processor and ONNX Runtime pack it, into the model's folder: it "
        "then loads in less time, and processes share its pages. Does nothing where that was done. For the CPU.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="an exported model folder")
    parser.add_argument("--again", action="store_true", help="even if what is there fits this machine")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prepares the folder and prints where."""
    from ..session import prepare

    folder = ModelFolder.open(args.model)
    done = prepare(folder, again=args.again)
    written = folder.path / PREPARED
    total = sum(file.stat().st_size for file in written.iterdir())
    note(f"{'prepared' if done else 'already prepared'}: {size(total)}")
    print(written)
    return 0
