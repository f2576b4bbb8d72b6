"""`tp-export lora`: a patch as a LoRA folder for PEFT."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to the parser."""
    parser = subparsers.add_parser(
        "lora",
        help="write a patch as a LoRA adapter",
        description="Write a patch as a LoRA folder that peft and transformers load, with the same logits. "
        "Prints the folder.",
    )
    parser.add_argument("patch", metavar="PATCH", type=Path, help="the patch file")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    parser.add_argument(
        "--base",
        required=True,
        metavar="SRC",
        help="the base model, a Hugging Face folder or a hub id: checked, and named in the adapter",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT once the new folder is whole")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the folder."""
    from tp_runtime.patch import Patch
    from tp_runtime.slots import check_base

    from ..module_names import beside, from_config
    from ..peft_out import write_peft
    from ..source import open_source

    patch = Patch.load(args.patch)
    source = open_source(args.base)
    check_base(patch, source.name, source.digest, "fp32")
    write_peft(patch, beside(from_config(source.config)), args.out, args.base, args.overwrite)
    print(args.out)
    return 0
