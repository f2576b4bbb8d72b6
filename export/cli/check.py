"""`tp-export check`: check that an exported model folder is complete and safe to run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tp_runtime.errors import ModelFormatError
from tp_runtime.session import ModelFolder, check_prepared, has_prepared
from tp_runtime.storage import REEXPORT
from tp_runtime.text import TABLES, TOKENIZER_FILES, build_tables


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "check",
        help="check an exported model folder",
        description="Hash every file of an exported model folder and check its graph: it may use only known operators, "
        "external data only inside the folder's own files, and the inputs and outputs that the description states. The "
        "tables of the tokenizer must be those of tokenizer.json. If "
        "this machine prepared the graph, the command also hashes the prepared files. With --tokens it compares the "
        "folder's token ids with those of transformers. With --source it also checks that the folder is an export of "
        "that source and predicts what the source predicts. It prints a line for each check. The first check that "
        "fails ends the command with exit code 2.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder written by tp-export")
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="compare the token ids with those of transformers",
    )
    parser.add_argument(
        "--source", metavar="SRC", help="compare with the Hugging Face folder or hub id that the folder was made from"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the lines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the folder and print the results; a failed check raises an error."""
    from ..graph_check import check_description, check_graph

    folder = ModelFolder.open(args.folder, verify=True)
    size = sum(record.bytes for record in folder.files.values())
    lines = [
        f"files: {len(folder.files)}, {size} bytes, all digests match",
        f"slots: {len(folder.slots)} in {folder.layers} layers",
        *check_graph(args.folder),
        check_description(args.folder),
        *_check_tables(folder),
    ]
    if args.tokens or args.source is not None:
        lines += _compare(folder, args.source)
    unused = None
    if has_prepared(folder):
        unused = check_prepared(folder)
        lines += [] if unused else ["prepared: this machine made it, all digests match"]
    if args.json:
        report = {
            "ok": True,
            "graph_digest": folder.graph_digest,
            "unlisted": folder.unlisted,
            "prepared_not_used": unused,
            "checks": lines,
        }
        print(json.dumps(report))
        return 0
    for line in lines:
        print(f"OK {line}")
    if unused:
        print(f"-- the prepared graph is not used, and not checked: {unused}")
    for name in folder.unlisted:
        print(f"-- {name!a} is not listed, so nothing reads it")
    return 0


def _check_tables(folder: ModelFolder) -> list[str]:
    """Check that the tables of the tokenizer, which are read in its place, say what tokenizer.json says."""
    if TABLES not in folder.files:
        return []
    if build_tables(folder.read(TOKENIZER_FILES[0])) != folder.read(TABLES):
        raise ModelFormatError(
            "the tables of the tokenizer are not those of tokenizer.json",
            field=TABLES,
            got="other bytes",
            wanted="the bytes that an export writes",
            fix=REEXPORT,
        )
    return ["tokenizer: its tables are those of tokenizer.json"]


def _compare(folder: ModelFolder, src: str | None) -> list[str]:
    from ..graph import check_against_source, check_token_ids
    from ..source import open_source

    return [check_token_ids(folder)] if src is None else check_against_source(folder, open_source(src))
