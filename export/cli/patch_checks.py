"""What `tp-export patch` refuses in its arguments before the minutes of work: bad values and contradictions."""

from __future__ import annotations

import argparse

from tp_runtime.errors import CalibrationError
from tp_runtime.storage import check_output_file

from .options import check_patch_file, given, require_at_least, require_folder_of
from .patch_options import HELD_OUT, RANK


def check_arguments(args: argparse.Namespace) -> None:
    """Check the arguments of one patch that are wrong whatever the base model and the queries are.

    Raises:
        CalibrationError: a value is out of range, two options contradict each other, or a folder does not exist.
        PatchFormatError: OUT cannot be a patch file.
        OutputError: the command may not replace an output, or an output is also an input.
        OSError: the folder of an output cannot be written.
    """
    inputs = given(args.src, args.prompt_file, args.queries, args.held_out, args.rollouts)
    check_patch_file(args.out, [*inputs, *given(args.save_queries)])
    if args.save_queries is not None:
        if args.save_queries.suffix.lower() != ".jsonl":
            raise CalibrationError(
                "the queries are saved as lines of JSON",
                field="--save-queries",
                got=str(args.save_queries),
                wanted="a name that ends in .jsonl",
            )
        require_folder_of("--save-queries", args.save_queries)
        # As with tp-export questions no file is replaced: nothing in it tells whose it is.
        check_output_file(args.save_queries, inputs=inputs)
    at_least = (
        ("--rank", RANK if args.rank is None else args.rank, 1),
        ("--limit", args.limit, 1),
        ("--holdout", HELD_OUT if args.holdout is None else args.holdout, 0),
        ("--prefix", 1 if args.prefix is None else args.prefix, 1 if args.method == "prefix" else 0),
        ("--samples", args.samples, 1),
        ("--refine", args.refine, 0),
        ("--first-layer", args.first_layer, 0),
        ("--max-new-tokens", args.max_new_tokens, 1),
    )
    for field, value, least in at_least:
        require_at_least(field, value, least)
    if args.target is not None or args.max_bytes is not None:
        chosen = (
            ("--prefix", args.prefix),
            ("--rank", args.rank),
            ("--method", args.method),
            ("--first-layer", args.first_layer or None),
            ("--refine", args.refine or None),
        )
        for field, value in chosen:
            if value is not None:
                raise CalibrationError(
                    "the search chooses this itself",
                    field=field,
                    got=value,
                    wanted="nothing beside --target or --max-bytes",
                    fix=f"leave {field} out, or leave the search out",
                )
    if args.best and args.target is None:
        raise CalibrationError("there is no search whose best could be taken", field="--best", wanted="--target")
    if args.ridge is not None and not 0 <= args.ridge < float("inf"):
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
