"""`tp-export patch`: compute a patch from a prompt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tp_runtime.errors import CalibrationError

from .options import (
    add_answer_length,
    add_context_options,
    add_device_options,
    add_source,
    check_patch_file,
    given,
    load_weights,
    read_any_context,
    read_context,
    require_at_least,
    require_folder_of,
)

_CALIBRATION_QUERIES = 64
_SEED = 0


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "patch",
        help="compute a patch from a prompt",
        description="Let the model answer queries with the prompt in front, and fit the prompt's effect on the layers "
        "in closed form. The fidelity is measured on queries that are held out of the fit. The command prints the path "
        "of the file.",
    )
    add_source(parser)
    parser.add_argument("out", metavar="OUT.safetensors", type=Path, help="the patch file to write")
    add_context_options(parser)
    add_device_options(parser)
    parser.add_argument(
        "--queries",
        type=Path,
        metavar="FILE",
        help="a file of queries, one per line, or a .json or .jsonl file (default: the built-in questions)",
    )
    parser.add_argument(
        "--held-out", type=Path, metavar="FILE", help="a file of queries to measure on, instead of --holdout"
    )
    parser.add_argument(
        "--holdout",
        type=int,
        default=16,
        metavar="N",
        help="the number of queries that are held out of the fit (default 16)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=_CALIBRATION_QUERIES,
        metavar="N",
        help=f"the largest number of queries to fit on (default {_CALIBRATION_QUERIES})",
    )
    parser.add_argument(
        "--method",
        choices=("vector", "output", "matrix", "lora", "prefix", "isotropic"),
        default="output",
        help="the form of the patch (default: output); output gives weights alone unless --prefix adds entries: such a "
        "patch has any strength, adds to every other patch and travels to other formats; a lora patch is added to the "
        "output of the MLP's last linear layer, for the LoRA export of Gemma-like models; a prefix patch has no "
        "weights, see --prefix; isotropic is a baseline for comparison",
    )
    parser.add_argument(
        "--no-bias",
        action="store_true",
        help="with --method lora: fit a pair of factors without a bias, for engines whose LoRA has no bias (vLLM) and "
        "for merging",
    )
    parser.add_argument(
        "--first-layer",
        type=int,
        default=0,
        metavar="N",
        help="leave the layers below N unpatched (default 0); control vectors of llama.cpp begin at layer 1",
    )
    parser.add_argument("--rank", type=int, default=16, help="the rank of each pair of factors (default 16)")
    parser.add_argument(
        "--ridge",
        type=float,
        default=1.0,
        help="the ridge, relative to the mean diagonal of the Gram matrix (default 1)",
    )
    parser.add_argument(
        "--prefix",
        type=int,
        default=0,
        metavar="N",
        help="store N key/value entries of the prompt per head, those that are attended to most (default 0: only "
        "weights)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=2,
        metavar="N",
        help="the number of answers to each query to fit on; one is greedy and the others are sampled (default 2)",
    )
    add_answer_length(parser)
    parser.add_argument(
        "--rollouts",
        type=Path,
        metavar="FILE.jsonl",
        help="store the teacher's answers in this file, and reuse those that it already has",
    )
    parser.add_argument(
        "--refine",
        type=int,
        default=0,
        metavar="STEPS",
        help="improve the closed form by this many gradient steps on the same parameters (default 0)",
    )
    parser.add_argument(
        "--student-precision",
        default="fp32",
        metavar="PRECISION",
        help="fit on the base as an export of this precision computes it (int8, int4, int4-rtn, ...), so that the "
        "patch also repairs what quantisation costs; without a prompt the patch is only a repair (default: fp32, for "
        "every precision)",
    )
    parser.add_argument("--name", help="the name of the patch (default: the file's name)")
    parser.add_argument("--store-prompt", action="store_true", help="store the prompt's text in the patch file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compute the patch, write it and print its path; its figures go to stderr."""
    from tp_runtime.patch import FLOAT_PRECISIONS

    from ..fit import Recipe, Settings, make_patch
    from ..measure import fidelity_line
    from ..quantise import check_precision
    from ..queries import load_questions, split_holdout
    from ..rollout import RolloutStore
    from ..source import open_source

    check_precision(args.student_precision)
    _check(args)  # bad arguments are found before the minutes of work
    repairs = args.student_precision not in FLOAT_PRECISIONS
    context = read_any_context(args) if repairs else read_context(args)
    queries = load_questions(args.queries)
    if args.held_out is not None:
        fitted, held_out = queries[: args.limit], load_questions(args.held_out)
    else:
        fitted, held_out = split_holdout(queries[: args.limit + args.holdout], args.holdout, _SEED)
    source = open_source(args.src)
    store = None if args.rollouts is None else RolloutStore(args.rollouts, source.digest)
    model = load_weights(source, args)
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
        store=store,
    )
    patch.save(args.out)
    if patch.config.fidelity:
        of = "the quantisation loss" if context is None else "the prompt"
        print(fidelity_line(patch.config.fidelity, of), file=sys.stderr)
    print(args.out)
    return 0


def _check(args: argparse.Namespace) -> None:
    check_patch_file(args.out, given(args.src, args.prompt_file, args.queries, args.held_out, args.rollouts))
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
        require_at_least(field, value, least)
    if not 0 <= args.ridge < float("inf"):
        raise CalibrationError(
            "the ridge is negative or not finite", field="--ridge", got=args.ridge, wanted="a finite number >= 0"
        )
    if args.refine and args.method == "prefix":
        raise CalibrationError(
            "the patch has no weights to refine", field="--refine", got=args.refine, wanted="0 with --method prefix"
        )
    if args.rollouts is not None:
        require_folder_of("--rollouts", args.rollouts)
    if args.refine and args.offload:
        raise CalibrationError(
            "gradient steps need all layers in memory", field="--refine", got=args.refine, wanted="0 with --offload"
        )
    if args.no_bias and args.method != "lora":
        raise CalibrationError(
            "only --method lora can leave out the bias", field="--no-bias", got=args.method, wanted="--method lora"
        )
