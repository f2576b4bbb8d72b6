"""`tp-export model`: export a base model to ONNX with patch slots."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_overwrite, add_source, given


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "model",
        help="export a base model to ONNX with patch slots",
        description="Export a base model to ONNX. The weights are stored in model.onnx_data. The patch deltas are "
        "initializers of their own, which a session can override. The command prints the path of the folder.",
    )
    add_source(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument(
        "--precision",
        default="fp32",
        help="the precision of the weights: fp32 (default), fp16, bf16 (only for storage), int8, int4 (the quantiser "
        "that loses least on held-out text), or one of the quantisers int4-symmetric, int4-rtn, int4-k-quant, "
        "int4-hqq, int4-gptq-symmetric, int4-gptq (the last two are calibrated on the model's own answers, for some "
        "minutes); those with -head4 behind symmetric, rtn, gptq-symmetric or gptq store the head in four bits too; "
        "int4-fp16 and int4-...-fp16 also compute in float16, for CUDA",
    )
    parser.add_argument(
        "--slots",
        choices=("output", "mlp", "all"),
        default="output",
        help="the places where patches can act: output = after the MLP (default), mlp = also at gate and up, "
        "all = at every linear layer, so that ordinary LoRA shapes fit",
    )
    parser.add_argument(
        "--patch", type=Path, metavar="FILE", help="a patch file whose deltas become the default of their slots"
    )
    parser.add_argument(
        "--route",
        choices=("auto", "fused", "optimum"),
        default="auto",
        help="the exporter: fused = with one attention operator, optimum = optimum's exporter, auto = fused if it "
        "works for the model (default)",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="with int8 or int4: fit a patch that compensates what quantisation costs, and make it the default of the "
        "folder (with --slots mlp it compensates more)",
    )
    add_overwrite(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export the model and print the folder's path."""
    from tp_runtime.patch import Patch
    from tp_runtime.session import MODEL_FOLDER
    from tp_runtime.storage import check_output_folder

    # This comes before the imports below, which take seconds.
    check_output_folder(args.out, MODEL_FOLDER if args.overwrite else None, given(args.src, args.patch))

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
