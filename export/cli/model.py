"""`tp-export model`: export a base model to ONNX with patch slots."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to the parser."""
    parser = subparsers.add_parser(
        "model",
        help="export a base model to ONNX with patch slots",
        description="Export a base model to ONNX: weights in model.onnx_data, patch deltas in their own initializers "
        "that a session can override. Prints the folder.",
    )
    parser.add_argument("src", metavar="SRC", help="a Hugging Face folder (such as fetch makes) or a hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    parser.add_argument(
        "--precision",
        default="fp32",
        help="fp32 (default), fp16, bf16 (stored only), int8, int4 (the quantiser that loses least on held-out text), "
        "or one of these: int4-symmetric, int4-rtn, int4-k-quant; or, with the head in four bits too, "
        "int4-symmetric-head4, int4-rtn-head4",
    )
    parser.add_argument(
        "--slots",
        choices=("output", "mlp", "all"),
        default="output",
        help="where patches can act: output = after the MLP (default), mlp = gate and up too, "
        "all = every linear layer, so that ordinary LoRA shapes fit",
    )
    parser.add_argument("--patch", type=Path, metavar="FILE", help="make this patch the default of its slots")
    parser.add_argument(
        "--route",
        choices=("auto", "fused", "optimum"),
        default="auto",
        help="fused = one attention operator (default where it works), optimum = optimum's exporter",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="with int8 or int4: fit a patch that makes up for the rounding, and make it the default of the folder "
        "(with --slots mlp it makes up for more)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT once the new folder is whole")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exports the model."""
    from tp_runtime.patch import Patch

    from ..graph import export_model
    from ..source import open_source

    patch = None if args.patch is None else Patch.load(args.patch)
    print(
        export_model(
            open_source(args.src),
            args.out,
            slot_set=args.slots,
            precision=args.precision,
            patch=patch,
            route=args.route,
            repair=args.repair,
            overwrite=args.overwrite,
        )
    )
    return 0
