"""`tp-export patch`: compute a patch from a prompt."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from tp_runtime.errors import BaseMismatchError, CalibrationError

from .options import load_weights, read_any_context, read_context, stop_strings, system_messages
from .patch_checks import check_arguments
from .patch_many import add_many_options, run_many
from .patch_options import HELD_OUT, RANK, add_fit_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tp_runtime.session import ModelFolder

    from ..fit import Recipe
    from ..rollout import PromptPair
    from ..source import Source

_SEED = 0


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
    add_fit_options(parser)
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
    check_arguments(args)  # bad arguments are found before the minutes of work
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
        kept = HELD_OUT if args.holdout is None else args.holdout
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
        settings=Settings(args.rank or RANK, ridge, args.first_layer, not args.no_bias),
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
