"""`tp-export adapter`: a patch for onnxruntime-genai."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to the parser."""
    parser = subparsers.add_parser(
        "adapter",
        help="write a patch as an .onnx_adapter for onnxruntime-genai",
        description="Write a patch as an adapter for the slots of one exported model folder, which onnxruntime-genai "
        "loads beside the folder. Prints the file.",
    )
    parser.add_argument("patch", metavar="PATCH", type=Path, help="the patch file")
    parser.add_argument("folder", metavar="MODEL_DIR", type=Path, help="the exported model folder")
    parser.add_argument("out", metavar="OUT.onnx_adapter", type=Path, help="the file to write")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the file."""
    from tp_runtime.patch import Patch
    from tp_runtime.session import ModelFolder

    from ..formats import write_onnx_adapter

    write_onnx_adapter(Patch.load(args.patch), ModelFolder.open(args.folder), args.out)
    print(args.out)
    return 0
