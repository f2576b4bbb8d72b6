"""`tp-export check`: is a model folder whole and safe to run?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tp_runtime.session import ModelFolder


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to the parser."""
    parser = subparsers.add_parser(
        "check",
        help="check an exported model folder",
        description="Hash every file of an exported model folder and check its graph: known operators only, "
        "and external data only inside the folder's own files. Prints a line for each check; the first that "
        "fails ends it with exit code 2.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder written by tp-export")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Checks the folder; a failed check raises."""
    from ..graph_check import check_graph

    folder = ModelFolder.open(args.folder, verify=True)
    size = sum(record.bytes for record in folder.files.values())
    lines = [
        f"files: {len(folder.files)}, {size} bytes, all digests match",
        f"slots: {len(folder.slots)} in {folder.layers} layers",
        *check_graph(args.folder),
    ]
    if args.json:
        report = {
            "ok": True,
            "graph_digest": folder.graph_digest,
            "unlisted": folder.unlisted,
            "checks": lines,
        }
        print(json.dumps(report))
        return 0
    for line in lines:
        print(f"OK {line}")
    for name in folder.unlisted:
        print(f"-- {name!a} is not listed: nothing reads it")
    return 0
