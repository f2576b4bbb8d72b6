"""`tp-export patch`: compute a patch from a prompt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tp_runtime.errors import CalibrationError

from .context import (
    add_context_options,
    add_device_options,
    check_patch_file,
    read_any_context,
    read_context,
    torch_device,
)

_CALIBRATION_QUERIES = 64
_SEED = 0


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to the parser."""
    parser = subparsers.add_parser(
        "patch",
        help="compute a patch from a prompt",
        description="Have the model answer queries with the prompt in front, and fit in closed form what it did to "
        "the layers. Queries held out of the fit give the figures. Prints the file.",
    )
    parser.add_argument("src", metavar="SRC", help="a Hugging Face folder or a hub id")
    parser.add_argument("out", metavar="OUT.safetensors", type=Path, help="the patch file to write")
    add_context_options(parser, required=False)
    add_device_options(parser)
    parser.add_argument(
        "--queries", type=Path, metavar="FILE", help="one query a line, or .json/.jsonl (default: built in)"
    )
    parser.add_argument("--held-out", type=Path, metavar="FILE", help="queries to measure on, instead of --holdout")
    parser.add_argument("--holdout", type=int, default=16, metavar="N", help="queries kept out of the fit (default 16)")
    parser.add_argument(
        "--limit",
        type=int,
        default=_CALIBRATION_QUERIES,
        metavar="N",
        help=f"queries to fit on at most (default {_CALIBRATION_QUERIES})",
    )
    parser.add_argument(
        "--method",
        choices=("vector", "output", "matrix", "lora", "prefix", "isotropic"),
        default="output",
        help="default: output; lora: beside the MLP's last linear layer, for LoRA export of Gemma-like models; prefix: "
        "no weights, see --prefix; isotropic: a baseline, for comparison",
    )
    parser.add_argument(
        "--no-bias",
        action="store_true",
        help="with --method lora: a pair alone, for engines whose LoRA has no bias (vLLM) and for merging",
    )
    parser.add_argument(
        "--first-layer",
        type=int,
        default=0,
        metavar="N",
        help="leave the blocks below N as they are (default 0); llama.cpp's control vectors begin at 1",
    )
    parser.add_argument("--rank", type=int, default=16, help="directions per pair (default 16)")
    parser.add_argument(
        "--ridge", type=float, default=1.0, help="relative to the mean diagonal of the Gram (default 1)"
    )
    parser.add_argument(
        "--prefix",
        type=int,
        default=0,
        metavar="N",
        help="carry N key/value entries a head of the prompt itself, those attended to most (default 0: weights alone)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=2,
        metavar="N",
        help="answers to fit on for each query, one greedy and the rest sampled (default 2)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=48, help="length of the teacher's answers (default 48)")
    parser.add_argument(
        "--rollouts",
        type=Path,
        metavar="FILE.jsonl",
        help="keep the teacher's answers here, and go on from those in it",
    )
    parser.add_argument(
        "--refine",
        type=int,
        default=0,
        metavar="STEPS",
        help="improve the closed form by gradient steps on the same parameters (default 0: off)",
    )
    parser.add_argument(
        "--student-precision",
        default="fp32",
        metavar="PRECISION",
        help="fit against the base as that export computes it (int8, int4, int4-rtn, ...), so that the patch also "
        "repairs what quantisation cost; without a prompt it is a repair alone (default: fp32, for every precision)",
    )
    parser.add_argument("--name", help="what the patch is called (default: the file's name)")
    parser.add_argument("--store-prompt", action="store_true", help="put the prompt's text into the file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Computes and writes the patch; its figures go to stderr."""
    from tp_runtime.patch import FLOAT_PRECISIONS

    from ..fit import Recipe, Settings, make_patch
    from ..progress import clock
    from ..quantise import check_precision
    from ..queries import load_questions, split_holdout
    from ..rollout import RolloutStore
    from ..source import load_model, open_source

    check_precision(args.student_precision)
    _check(args)  # everything that can be wrong with the arguments, before the minutes of work
    repairs = args.student_precision not in FLOAT_PRECISIONS
    context = read_any_context(args) if repairs else read_context(args)
    queries = load_questions(args.queries)
    if args.held_out is not None:
        fitted, held_out = queries[: args.limit], load_questions(args.held_out)
    else:
        fitted, held_out = split_holdout(queries[: args.limit + args.holdout], args.holdout, _SEED)
    source = open_source(args.src)
    device = torch_device(args.device)
    with clock("load weights"):
        model = load_model(source, device, offload=args.offload)
    recipe = Recipe(
        method=args.method,
        settings=Settings(args.rank, args.ridge, args.first_layer, not args.no_bias),
        prefix=args.prefix,
        samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        refine_steps=args.refine,
        student_precision=args.student_precision,
    )
    patch = make_patch(
        source,
        model,
        context,
        fitted,
        held_out,
        recipe,
        name=args.name or args.out.stem,
        store_context=args.store_prompt,
        store=None if args.rollouts is None else RolloutStore(args.rollouts, source.digest),
    )
    patch.save(args.out)
    if patch.config.fidelity:
        figures = patch.config.fidelity
        print(
            f"held out: {figures['gap_closed']:.1%} of {'the quantisation loss' if context is None else 'the prompt'} "
            f"(KL {figures['kl_unpatched']:.3f} -> {figures['kl_patched']:.3f} nats per token, "
            f"{figures['completion_tokens']} tokens of {figures['queries']} queries)",
            file=sys.stderr,
        )
    print(args.out)
    return 0


def _check(args: argparse.Namespace) -> None:
    check_patch_file(args.out)
    at_least = (
        ("--rank", args.rank, 1),
        ("--limit", args.limit, 1),
        ("--holdout", args.holdout, 0),
        ("--prefix", args.prefix, 1 if args.method == "prefix" else 0),
        ("--samples", args.samples, 1),
        ("--refine", args.refine, 0),
        ("--first-layer", args.first_layer, 0),
        ("--max-new-tokens", args.max_new_tokens, 1),
    )
    for field, value, least in at_least:
        if value < least:
            raise CalibrationError("too small", field=field, got=value, wanted=f"at least {least}")
    if not 0 <= args.ridge < float("inf"):
        raise CalibrationError("not a ridge", field="--ridge", got=args.ridge, wanted="a finite number >= 0")
    if args.refine and args.method == "prefix":
        raise CalibrationError(
            "there are no weights to refine", field="--refine", got=args.refine, wanted="0 with --method prefix"
        )
    if args.rollouts is not None and not args.rollouts.resolve().parent.is_dir():
        raise CalibrationError("no such folder", field="--rollouts", got=str(args.rollouts.parent), fix="make it first")
    if args.refine and args.offload:
        raise CalibrationError(
            "gradients need all layers in memory", field="--refine", got=args.refine, wanted="0 with --offload"
        )
    if args.no_bias and args.method != "lora":
        raise CalibrationError("a form that has a bias", field="--no-bias", got=args.method, wanted="--method lora")
