"""`tp-runtime prepare` packs the weights of a model folder's graph for this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..session import PREPARED, ModelFolder
from .printing import note, size


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "prepare",
        help="pack a model's weights once for this machine",
        description="Write the graph into the model's folder as ONNX Runtime packs it for this machine's processor. "
        "The model then loads in less time, and processes share its memory pages. If this was done before, the command "
        "does nothing. Only the CPU uses the result.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="an exported model folder")
    parser.add_argument(
        "--again", action="store_true", help="prepare the graph even if one that fits this machine is already there"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prepare the folder's graph and print the path of the result."""
    from ..session import prepare

    folder = ModelFolder.open(args.model)
    done = prepare(folder, again=args.again)
    written = folder.path / PREPARED
    total = sum(file.stat().st_size for file in written.iterdir())
    note(f"{'prepared' if done else 'already prepared'}: {size(total)}")
    print(written)
    return 0
