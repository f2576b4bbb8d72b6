"""`tp-export control-vector`: write a thought vector as a GGUF control vector."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "control-vector",
        help="write a patch of biases as a GGUF control vector",
        description="Write the biases of a patch as a control vector that llama.cpp and repeng read. A control vector "
        "holds nothing else, and llama.cpp has no direction for block 0. The command therefore refuses a patch with "
        "other parts or with a delta in block 0. It prints the path of the file.",
    )
    parser.add_argument("patch", metavar="PATCH", type=Path, help="the patch file")
    parser.add_argument("out", metavar="OUT.gguf", type=Path, help="the file to write")
    parser.add_argument(
        "--lossy",
        action="store_true",
        help="leave out the parts that a control vector cannot store, and list them on stderr",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the control vector and print its path."""
    from tp_runtime.patch import Patch
    from tp_runtime.storage import check_output_file

    from ..formats import CONTROL_VECTOR, check_lossless, control_vector_parts, write_control_vector

    check_output_file(args.out, CONTROL_VECTOR, [args.patch])
    patch = Patch.load(args.patch)
    directions, biases, pairs = control_vector_parts(patch)
    if not args.lossy:
        fix = "fit it with tp-export patch --method vector --first-layer 1"
        check_lossless(patch, pairs + biases, "a control vector", fix)
    write_control_vector(directions, patch.config.architecture, args.out)
    for part in pairs + biases:
        print(f"left out: {part}", file=sys.stderr)
    print(args.out)
    return 0
