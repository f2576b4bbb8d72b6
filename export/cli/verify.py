"""`tp-export verify`: check the theorem on a model.

With the exact patch of each token, the student computes the same as the teacher.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tp_runtime.errors import CalibrationError

from .options import (
    add_context_options,
    add_device_option,
    add_source,
    load_weights,
    read_any_context,
    require_at_least,
)

# The default prompt and queries for each style of model.
_CONTEXTS: Mapping[str, str] = {
    "chat": "You are a pirate captain. Speak only in pirate slang.",
    "completion": "dog: chien\ncat: chat\nhouse: maison\n",
}
_QUERIES: Mapping[str, tuple[str, ...]] = {
    "chat": (
        "Tell me about bees.",
        "What is the capital of Italy?",
        "How do I boil an egg?",
        "Why is the sky blue?",
        "Write a short poem about rain.",
    ),
    "completion": ("tree:", "bread:", "water:", "red:", "book:"),
}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "verify",
        help="show that exact token-dependent patches reproduce a prompt",
        description="For every token of the prompted model's greedy answers, solve the exact patch of that token, "
        "write it into the weights, run the query without the prompt, and compare. The command prints the number of "
        "tokens that agree and the largest logit error. For each layer it prints the largest error of the residual "
        "stream o that leaves the layer, at the last position: max |o_student - o_teacher| / rms(o_teacher). In "
        "float32 all errors are rounding errors.",
    )
    add_source(parser)
    add_context_options(parser)
    add_device_option(parser)
    parser.add_argument(
        "--queries",
        type=Path,
        metavar="FILE",
        help="a file of queries, one per line, or a .json or .jsonl file (default: built-in queries)",
    )
    parser.add_argument(
        "--tokens", type=int, default=20, metavar="N", help="the number of tokens of each answer (default 20)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="the dtype of the weights and of the whole computation (default float32)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the lines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify the theorem on every query and print the figures."""
    from ..fit import verify
    from ..progress import bar
    from ..queries import load_questions
    from ..rollout import check_prompts
    from ..source import open_source

    require_at_least("--tokens", args.tokens, 1)
    source = open_source(args.src)
    given = read_any_context(args)
    context = _CONTEXTS[source.style] if given is None else given
    if not context.strip():
        raise CalibrationError("the prompt is empty", field="--prompt", got=repr(context), wanted="text")
    queries = load_questions(args.queries) if args.queries else _QUERIES[source.style]
    prompts = [(source.codec.render(query, context), source.codec.render(query)) for query in queries]
    model = load_weights(source, args, args.dtype)
    check_prompts([ids for pair in prompts for ids in pair], args.tokens, model)
    tokens = []
    with bar("exact patches", len(queries) * args.tokens, "token") as shown:
        for teacher, student in prompts:
            tokens += verify(model, teacher, student, args.tokens, progress=shown.update)
    report = {
        "base_model": source.name,
        "architecture": source.architecture,
        "dtype": args.dtype,
        "queries": len(queries),
        "tokens": len(tokens),
        "agreed": sum(token.student == token.teacher for token in tokens),
        "agreed_unpatched": sum(token.unpatched == token.teacher for token in tokens),
        "max_logit_error": max(token.max_logit_error for token in tokens),
        "max_logit_error_unpatched": max(token.unpatched_logit_error for token in tokens),
        "max_residual_error": [max(errors) for errors in zip(*(t.residual_errors for t in tokens), strict=True)],
    }
    if args.json:
        print(json.dumps(report))
        return 0
    print(f"{source.name} ({source.architecture}), {args.dtype}: {len(queries)} queries, {args.tokens} tokens each")
    print(f"tokens agreed    {report['agreed']} of {report['tokens']} (without a patch {report['agreed_unpatched']})")
    print(
        f"max logit error  {report['max_logit_error']:.2g} (without a patch {report['max_logit_error_unpatched']:.2g})"
    )
    print("max error of the residual stream, relative to its rms, after layer")
    for layer, error in enumerate(report["max_residual_error"]):
        print(f"{layer:>5}  {error:.2g}")
    return 0
