"""`tp-export adapter`: write a patch as an adapter for onnxruntime-genai."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "adapter",
        help="write a patch as an .onnx_adapter for onnxruntime-genai",
        description="Write a patch as an adapter for the slots of one exported model folder. onnxruntime-genai loads "
        "the adapter together with the folder. The command prints the path of the file.",
    )
    parser.add_argument("patch", metavar="PATCH", type=Path, help="the patch file")
    parser.add_argument("folder", metavar="MODEL_DIR", type=Path, help="the exported model folder")
    parser.add_argument("out", metavar="OUT.onnx_adapter", type=Path, help="the file to write")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the adapter and print its path."""
    from tp_runtime.patch import Patch
    from tp_runtime.session import ModelFolder
    from tp_runtime.storage import check_output_file

    from ..formats import ONNX_ADAPTER, write_onnx_adapter

    check_output_file(args.out, ONNX_ADAPTER, [args.patch])
    write_onnx_adapter(Patch.load(args.patch), ModelFolder.open(args.folder), args.out)
    print(args.out)
    return 0
