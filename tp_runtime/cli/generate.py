"""`tp-runtime generate` prints one completion, or several answers to one prompt."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import RequestError, shown
from ..model import PatchedModel
from ..storage import StrictJSONError, parse_json
from ..text import RequestOptions, Result
from .options import (
    add_model_options,
    add_patch_option,
    add_sampling_options,
    note_if_cut,
    open_model,
    read_patches,
    read_text,
    sampling_options,
)
from .printing import emit


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "generate",
        help="complete one text",
        description="Complete one text, under no patch, one patch or the sum of several patches, and print the "
        "completion while it is generated.",
    )
    add_model_options(parser)
    parser.add_argument(
        "text", metavar="TEXT", help="the message to the model, or the text to continue; - reads it from stdin"
    )
    add_patch_option(parser)
    parser.add_argument(
        "--system", metavar="TEXT", help="a system message; for a completion-style model, text in front of TEXT"
    )
    parser.add_argument("--raw", action="store_true", help="use TEXT as it is, without the chat template")
    add_sampling_options(parser)
    _add_form_options(parser)
    parser.add_argument(
        "--lookup",
        type=int,
        default=0,
        metavar="N",
        help="copy up to N tokens at a time from the text so far, where the model would write them too (default 0)",
    )
    parser.add_argument(
        "-n", type=int, dest="answers", metavar="N", help="print N answers, which run together and share the prompt"
    )
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: report each token's N likeliest tokens (0: itself only)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the text")
    parser.set_defaults(run=run)


def _add_form_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what the answer is, and what the template gets")
    constraint = group.add_mutually_exclusive_group()
    constraint.add_argument("--json-schema", metavar="FILE", help="the answer is JSON that this schema accepts")
    constraint.add_argument("--regex", metavar="EXPR", help="the whole answer matches this regular expression")
    constraint.add_argument("--grammar", metavar="FILE", help="the answer follows this Lark grammar")
    group.add_argument("--tools", metavar="FILE", help="a JSON list of tools in OpenAI's form")
    group.add_argument("--tool-choice", metavar="CHOICE", help="auto (default), none, required, or a tool's name")
    group.add_argument("--documents", metavar="FILE", help="a JSON list of documents")
    group.add_argument(
        "--template-arg",
        action="append",
        metavar="NAME=JSON",
        help="a further variable of the chat template, such as enable_thinking=false; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Generate a completion. If possible, bad input raises before the model is opened."""
    options: RequestOptions = {**sampling_options(args), **_form_options(args)}
    text = _read_stdin() if args.text == "-" else args.text
    if not text.strip():
        raise RequestError("the prompt is empty", field="TEXT", got=shown(text), wanted="text that is not blank")
    selection = read_patches(args.patch)
    model = open_model(args)
    options |= {"system": args.system, "raw": args.raw, "patch": selection.choice, "lookup": args.lookup}
    if args.json:
        if args.logprobs is not None:
            options["logprobs"] = args.logprobs
        parts = [asdict(part) for part in selection.applied(model.graph.folder)]
        if args.answers is None:
            report = _report(model.complete(text, **options))
        else:
            report = {"answers": [_report(result) for result in model.complete(text, n=args.answers, **options)]}
        print(json.dumps({**report, "patches": parts, **_on(model)}))
    elif args.answers is not None:
        for number, result in enumerate(model.complete(text, n=args.answers, **options)):
            emit(f"{_BETWEEN if number else ''}{result.text}\n")
    else:
        _print_stream(model, text, options)
    return 0


_BETWEEN = "\n---\n\n"


def _print_stream(model: PatchedModel, text: str, options: RequestOptions) -> None:
    stream = model.stream(text, **options)
    try:
        for chunk in stream:
            emit(chunk)
    finally:
        print(flush=True)  # also after an interruption, so that the next output begins on a new line
    note_if_cut(stream, options["max_new_tokens"])


def _form_options(args: argparse.Namespace) -> RequestOptions:
    options: RequestOptions = {}
    if args.json_schema is not None:
        options["json_schema"] = read_text(Path(args.json_schema), "--json-schema")
    if args.regex is not None:
        options["regex"] = args.regex
    if args.grammar is not None:
        options["grammar"] = read_text(Path(args.grammar), "--grammar")
    if args.tools is not None:
        options["tools"] = _json(read_text(Path(args.tools), "--tools"), "--tools")
    if args.tool_choice is not None:
        words = ("auto", "none", "required")
        named = {"type": "function", "function": {"name": args.tool_choice}}
        options["tool_choice"] = args.tool_choice if args.tool_choice in words else named
    if args.documents is not None:
        options["documents"] = _json(read_text(Path(args.documents), "--documents"), "--documents")
    if args.template_arg is not None:
        pairs = [spec.partition("=") for spec in args.template_arg]
        options["template_args"] = {name: _json(value, f"--template-arg {name}") for name, _equals, value in pairs}
    return options


def _json(text: str, field: str) -> Any:
    try:
        return parse_json(text)
    except StrictJSONError as error:
        raise RequestError(f"the text {error.problem}", field=field, got=error.got, wanted=error.wanted) from error


def _report(result: Result) -> dict[str, Any]:
    """Return what --json prints of a result; fields that the request did not ask for are left out."""
    first, pace = result.timings.first_token, result.timings.ms_per_token
    report: dict[str, Any] = {
        "text": result.text,
        "prompt_tokens": result.usage.prompt_tokens,
        "completion_tokens": result.usage.completion_tokens,
        "finish_reason": result.finish_reason,
        "seconds_to_first_token": None if first is None else round(first, 6),
        "ms_per_token": None if pace is None else round(pace, 3),
    }
    if result.logprobs is not None:
        report["logprobs"] = [_finite(asdict(info)) for info in result.logprobs]
    if result.tool_calls:
        report["tool_calls"] = [asdict(call) for call in result.tool_calls]
    if result.reasoning is not None:
        report["reasoning"] = result.reasoning
    return report


def _finite(info: dict[str, Any]) -> dict[str, Any]:
    """Return a token's log-probabilities with null for minus infinity, which JSON does not have."""
    logprob = info["logprob"] if info["logprob"] > -float("inf") else None
    return {**info, "logprob": logprob, **({"top": [_finite(one) for one in info["top"]]} if "top" in info else {})}


def _on(model: PatchedModel) -> dict[str, str]:
    device = model.graph.device
    return {"device": device.kind, "provider": device.provider}


def _read_stdin() -> str:
    """Return all of stdin without the newline at its end. The codec refuses bytes that are not UTF-8."""
    if sys.stdin is None:
        raise RequestError("stdin is closed", field="TEXT", got="-", wanted="text on stdin")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin.read().removesuffix("\n")
