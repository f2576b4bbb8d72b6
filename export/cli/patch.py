"""`tp-export patch`: compute a patch from a prompt."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tp_runtime.errors import BaseMismatchError, CalibrationError

from .options import (
    add_answer_length,
    add_context_options,
    add_device_options,
    add_source,
    add_stop,
    add_system_messages,
    check_patch_file,
    given,
    load_weights,
    read_any_context,
    read_context,
    require_at_least,
    require_folder_of,
    stop_strings,
    system_messages,
)
from .patch_many import add_many_options, run_many

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tp_runtime.session import ModelFolder

    from ..fit import Recipe
    from ..rollout import PromptPair
    from ..source import Source

_CALIBRATION_QUERIES = 64
_HELD_OUT = 16
_SEED = 0
_RANK = 16


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "patch",
        help="compute a patch from a prompt",
        description="Let the model answer queries with the prompt in front, and fit what the prompt does to the layers "
        "in closed form: as key/value entries that stand in for the prompt's, as weights, or both. Without --method, "
        "--rank, --prefix, --target and --max-bytes a short prompt keeps all its entries, which is exact, and a long "
        "one is compacted. The fidelity is measured on queries that are held out of the fit. The command prints the "
        "path of the file.",
    )
    add_source(parser)
    parser.add_argument("out", metavar="OUT.safetensors", type=Path, help="the patch file to write")
    add_context_options(parser)
    add_device_options(parser)
    parser.add_argument(
        "--queries",
        type=Path,
        metavar="FILE",
        help="a file of queries, one per line, or a .json or .jsonl file (default: the built-in questions, and for a "
        "long prompt of a chat model as many that the model writes about it)",
    )
    parser.add_argument(
        "--held-out", type=Path, metavar="FILE", help="a file of queries to measure on, instead of --holdout"
    )
    parser.add_argument(
        "--holdout",
        type=int,
        metavar="N",
        help=f"how many queries are held out of the fit (default {_HELD_OUT}); with --held-out, how many of its first "
        "queries are measured (default: all)",
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
        help="the form of the weights (default: output with --rank, otherwise prefix); output gives weights alone "
        "unless --prefix adds entries: such a patch has any strength, adds to every other patch and travels to other "
        "formats; a lora patch is added to the output of the MLP's last linear layer, for the LoRA export of "
        "Gemma-like models; a prefix patch has entries and no weights, see --prefix; isotropic is a baseline for "
        "comparison",
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
    parser.add_argument("--rank", type=int, help="the rank of each pair of factors (default 16 where there are any)")
    parser.add_argument(
        "--ridge",
        type=float,
        help="the ridge of the weights, relative to the mean diagonal of the Gram matrix (default 1)",
    )
    parser.add_argument(
        "--prefix",
        type=_entries,
        metavar="N",
        help="compact the prompt to N key/value entries for each head of a layer, on average over the layers; `all` "
        "keeps every entry, which is exact; 0 gives weights alone",
    )
    parser.add_argument(
        "--before-system",
        action="store_true",
        help="let the prompt stand in front of a system message that every request has of its own, with a blank line "
        "between them, not in place of one",
    )
    add_system_messages(parser, "with --before-system built-in messages")
    parser.add_argument(
        "--target",
        type=float,
        metavar="SHARE",
        help="find the smallest file that reaches this share of the prompt's effect, such as 0.95, on a part of the "
        "calibration queries that is kept for the choice",
    )
    parser.add_argument(
        "--max-bytes",
        type=_size,
        metavar="SIZE",
        help="the largest size of the file, such as 2MB; without --target the best file of that size",
    )
    parser.add_argument(
        "--best", action="store_true", help="write the best file that was found if none reaches --target"
    )
    parser.add_argument(
        "--dtype",
        choices=("i4", "i8", "f16", "bf16", "f32"),
        help="the dtype of entries and factors in the file (default: i8, with scales, which costs at most 0.002 of the "
        "prompt's effect; with --target or --max-bytes i4 or i8, whichever serves better). i4 holds twice as many "
        "entries in the same bytes, fitted for it; factors are i8 beside them",
    )
    parser.add_argument(
        "--no-restating",
        action="store_true",
        help="fit the answers to the queries only; otherwise a long prompt of a chat model is repeated and echoed too, "
        "so that the fit sees all of it",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=2,
        metavar="N",
        help="the number of answers to each query to fit on; one is greedy and the others are sampled (default 2)",
    )
    add_answer_length(parser)
    add_stop(parser, "none; the file remembers it, and the runtime stops there too")
    parser.add_argument(
        "--rollouts",
        type=Path,
        metavar="FILE.jsonl",
        help="store the teacher's answers in this file, and reuse those that it already has",
    )
    parser.add_argument(
        "--save-queries",
        type=Path,
        metavar="FILE.jsonl",
        help="save the queries that the patch is fitted on, which the model writes in part, in this new file: for "
        "--queries here, and for --calibration of tp-export report",
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
    parser.add_argument(
        "--student",
        type=Path,
        metavar="FOLDER",
        help="fit behind the weights of this exported folder: as --student-precision with its precision, but with "
        "exactly its weights, which a calibrated precision (int4-gptq) does not give again on every machine",
    )
    parser.add_argument("--name", help="the name of the patch (default: the file's name)")
    parser.add_argument("--store-prompt", action="store_true", help="store the prompt's text in the patch file")
    add_many_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compute one patch, or one for each prompt of a folder."""
    if args.prompts is not None:
        return run_many(args, fit_one)
    if args.ray is not None:
        raise CalibrationError("Ray fits many patches", field="--ray", got=args.ray, wanted="--prompts DIR beside it")
    return fit_one(args)


def fit_one(args: argparse.Namespace) -> int:
    """Compute the patch, write it and print its path; its figures go to stderr."""
    from tp_runtime.patch import FLOAT_PRECISIONS

    from ..fit import Target, make_patch
    from ..graph import stored_student
    from ..measure import fidelity_line
    from ..quantise import check_precision
    from ..queries import load_answers, load_questions, save_questions, split_holdout
    from ..rollout import Prompting, RolloutStore
    from ..source import open_source

    folder = None if args.student is None else _student_folder(args)
    check_precision(args.student_precision)
    _check(args)  # bad arguments are found before the minutes of work
    stop = stop_strings(args.stop)
    systems = system_messages(args, args.before_system, "--before-system")
    target = None
    if args.target is not None or args.max_bytes is not None:
        dtypes = ("i4", "i8") if args.dtype is None else (args.dtype,)
        target = Target(args.target, args.max_bytes, args.best, dtypes)
    repairs = args.student_precision not in FLOAT_PRECISIONS
    context = read_any_context(args) if repairs else read_context(args)
    queries = load_questions(args.queries)
    if args.held_out is not None:
        fitted, held_out = queries[: args.limit], load_questions(args.held_out)[: args.holdout]
    else:
        kept = _HELD_OUT if args.holdout is None else args.holdout
        fitted, held_out = split_holdout(queries[: args.limit + kept], kept, _SEED)
    held_out_file = args.held_out or args.queries
    answers = {} if held_out_file is None else load_answers(held_out_file)
    source = open_source(args.src)
    if folder is not None and folder.base_digest != source.digest:
        raise BaseMismatchError(
            "the folder is not an export of this source",
            field="--student",
            got=folder.base_digest[:16],
            wanted=source.digest[:16],
            fix="give the source that the folder was exported from",
        )
    store = None if args.rollouts is None else RolloutStore(args.rollouts, source.digest)
    model = load_weights(source, args)
    prompts = Prompting(source.codec, context, systems.fitted if systems else ()).pairs([*fitted, *held_out])
    recipe = _recipe(args, source, context, prompts, stop)
    if args.queries is None and recipe.prefix and context is not None:
        fitted = _with_own_questions(source, model, context, fitted, held_out, args.save_queries is not None)
    patch = make_patch(
        source,
        model,
        context,
        fitted,
        held_out,
        recipe,
        name=args.name or args.out.stem,
        target=target,
        answers=answers,
        store_context=args.store_prompt,
        store=store,
        systems=systems,
        student=None if folder is None else stored_student(model, folder),
    )
    if args.save_queries is not None:
        save_questions(args.save_queries, fitted)
    patch.save(args.out)
    if patch.config.fidelity:
        of = "the quantisation loss" if context is None else "the prompt"
        print(fidelity_line(patch.config.fidelity, of), file=sys.stderr)
    print(args.out)
    return 0


def _student_folder(args: argparse.Namespace) -> ModelFolder:
    """Open the folder of --student, and give the arguments its precision."""
    from tp_runtime.patch import FLOAT_PRECISIONS
    from tp_runtime.session import ModelFolder

    folder = ModelFolder.open(args.student)
    if args.student_precision not in ("fp32", folder.precision) or folder.precision in FLOAT_PRECISIONS:
        raise CalibrationError(
            "the folder does not have the student's precision",
            field="--student",
            got=folder.precision,
            wanted="a quantised precision" if args.student_precision == "fp32" else args.student_precision,
            fix="leave --student out to fit on the float base, or leave --student-precision out",
        )
    args.student_precision = folder.precision
    return folder


def _recipe(
    args: argparse.Namespace,
    source: Source,
    context: str | None,
    prompts: Sequence[PromptPair],
    stop: tuple[str, ...],
) -> Recipe:
    """Return the recipe that the options ask for; what they leave open depends on the length of the context."""
    from ..fit import ALL, Recipe, Settings

    method, prefix = args.method, args.prefix
    searched = args.target is not None or args.max_bytes is not None
    if method is None and (context is None or prefix == 0 or (_asks_for_weights(args) and not searched)):
        method = "output"
    if method is None and prefix is None and not searched:
        prefix = _default_entries(source, prompts)
        method = "prefix" if prefix else "output"
    method = method or "prefix"
    if prefix is None:
        prefix = ALL if method == "prefix" else 0
    ridge = 1.0 if args.ridge is None else args.ridge
    return Recipe(
        method=method,
        settings=Settings(args.rank or _RANK, ridge, args.first_layer, not args.no_bias),
        prefix=prefix,
        dtype=args.dtype or "i8",
        restate=not args.no_restating,
        stop=stop,
        samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        refine_steps=args.refine,
        student_precision=args.student_precision,
    )


def _default_entries(source: Source, prompts: Sequence[PromptPair]) -> int:
    """Return the number of entries for a context of this length; 0, with a note, if entries cannot stand in for it."""
    from ..fit import default_entries
    from ..rollout import context_length

    length = context_length(source.codec, prompts)
    if length is None:
        print("note: no one beginning holds the prompt, so the patch gets weights alone", file=sys.stderr)
        return 0
    return default_entries(length)


def _asks_for_weights(args: argparse.Namespace) -> bool:
    """Return whether an option that only weights have was given."""
    return args.rank is not None or args.ridge is not None or bool(args.first_layer or args.refine)


def _with_own_questions(
    source: Source, model: Any, context: str, fitted: Sequence[str], held_out: Sequence[str], saved: bool
) -> list[str]:
    """Replace half of the built-in questions with questions that the model writes about a long context.

    A note on stderr says so if they are not saved.
    """
    from ..fit import LONG_CONTEXT
    from ..progress import bar
    from ..queries import statements, unlike, write_questions
    from ..rollout import Context, Prompting, context_length

    asked = Prompting(source.codec, context)  # the questions are about the prompt, whatever stands behind it
    prompts = asked.pairs([*fitted, *held_out])
    if source.codec.style != "chat" or (context_length(source.codec, prompts) or 0) <= LONG_CONTEXT:
        return list(fitted)
    prepared = Context.of(model, asked, prompts)
    half = len(fitted) // 2
    rounds = min(4, -(-half // max(1, len(statements(context)))))
    with bar("questions about the prompt", rounds * len(statements(context)), "answer") as shown:
        found = write_questions(source, model, context, rounds, prefix=prepared.cached, progress=shown.update)
    own = unlike(found, held_out)[:half]
    if own and not saved:
        print(
            f"note: the model wrote {len(own)} of the {len(fitted)} queries; --save-queries FILE.jsonl keeps them, and "
            "tp-export report needs them to compare methods",
            file=sys.stderr,
        )
    return [*own, *fitted[: len(fitted) - len(own)]]


def _entries(text: str) -> int:
    """Return the number of entries that --prefix names."""
    from ..fit import ALL

    if text == "all":
        return ALL
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number of entries, or all")
    return int(text)


def _size(text: str) -> int:
    """Return the number of bytes that --max-bytes names, with the decimal units kB, MB and GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a size such as 500kB or 2MB")
    return int(float(found[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[found[2].lower()])


def _check(args: argparse.Namespace) -> None:
    from tp_runtime.storage import check_output_file

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
        ("--rank", _RANK if args.rank is None else args.rank, 1),
        ("--limit", args.limit, 1),
        ("--holdout", _HELD_OUT if args.holdout is None else args.holdout, 0),
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
