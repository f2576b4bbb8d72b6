"""`tp-export fetch`: download a base model by its name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "fetch",
        help="download a base model by its name",
        description="Download a base model and its tokenizer, check their digests and write a model folder. "
        "The command prints the path of the folder. A second call finds the folder and downloads nothing.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("name", nargs="?", metavar="NAME", help="the name of a model; --list shows the names")
    what.add_argument("--list", action="store_true", help="list the models with their licences")
    parser.add_argument(
        "--to",
        type=Path,
        metavar="DIR",
        help="the folder to write (default: models/NAME in $TP_HOME or in ~/.cache/tp-runtime)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetch the model and print its folder, or list the models."""
    from ..fetch import fetch, load_manifest, manifest_names

    if args.list:
        for manifest in map(load_manifest, manifest_names()):
            print(f"{manifest.name}\t{manifest.style}\t{manifest.licence.name}\t{manifest.licence.url}")
        return 0
    print(fetch(args.name, args.to))
    return 0
