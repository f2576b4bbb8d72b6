"""`tp-export lora`: write a patch as a LoRA adapter for PEFT or for llama.cpp."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import add_overwrite

if TYPE_CHECKING:
    from tp_runtime.patch import Patch, SlotKey

    from ..decoder import SiteLinear


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "lora",
        help="write a patch as a LoRA adapter",
        description="Write a patch as a LoRA folder that peft and transformers load and that gives the same logits. "
        "With --gguf, write it as the files that llama.cpp loads. The command prints the path of the folder.",
    )
    parser.add_argument("patch", metavar="PATCH", type=Path, help="the patch file")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument(
        "--base",
        required=True,
        metavar="SRC",
        help="the base model, a Hugging Face folder or a hub id; the command checks that the patch belongs to it, and "
        "the adapter states its name",
    )
    parser.add_argument(
        "--gguf",
        action="store_true",
        help="write lora.gguf, and control-vector.gguf for the biases, since a LoRA of llama.cpp has no biases",
    )
    parser.add_argument(
        "--lossy", action="store_true", help="with --gguf: leave out biases that neither file can store"
    )
    add_overwrite(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the folder and print its path."""
    from tp_runtime.patch import Patch
    from tp_runtime.session import check_base
    from tp_runtime.storage import check_output_folder

    from ..decoder import model_without_weights, site_linears
    from ..formats import LORA_FOLDER, write_peft
    from ..source import open_source

    replaces, inputs = LORA_FOLDER if args.overwrite else None, [args.patch, args.base]
    check_output_folder(args.out, replaces, inputs)
    patch = Patch.load(args.patch)
    source = open_source(args.base)
    check_base(patch, source.name, source.digest, "fp32", source.digest_change)
    layers = site_linears(model_without_weights(source.config))
    if args.gguf:
        _write_gguf(patch, layers, args)
    else:
        write_peft(patch, layers, args.out, args.base, replaces)
    print(args.out)
    return 0


def _write_gguf(patch: Patch, layers: dict[SlotKey, SiteLinear], args: argparse.Namespace) -> None:
    from tp_runtime.storage import atomic_folder

    from ..formats import (
        BIASES_FILE,
        LORA_FILE,
        LORA_FOLDER,
        check_lossless,
        control_vector_parts,
        pairs,
        write_control_vector,
        write_gguf_lora,
    )

    found = pairs(patch, layers)
    # Without a post-norm the bias of `down` is added to the block's output like that of `mlp_out`.
    sites = {"mlp_out", "down"} if (0, "mlp_out") in layers else {"mlp_out"}
    directions, lost, _ = control_vector_parts(patch, sites)
    if not args.lossy:
        fix = "fit it with tp-export patch --method output --first-layer 1, or --method lora --no-bias"
        check_lossless(patch, lost, "llama.cpp", fix)
    count = 1 + max(layer for layer, _ in layers)
    replaces = LORA_FOLDER if args.overwrite else None
    with atomic_folder(args.out, replaces, [args.patch, args.base]) as folder:
        write_gguf_lora(found, patch.config.architecture, count, folder / LORA_FILE)
        if directions:
            write_control_vector(directions, patch.config.architecture, folder / BIASES_FILE)
    for part in lost:
        print(f"left out: {part}", file=sys.stderr)
