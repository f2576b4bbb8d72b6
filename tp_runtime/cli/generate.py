"""`tp-runtime generate` prints one completion."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from ..errors import RequestError, shown
from ..model import TextStream
from .options import (
    add_model_options,
    add_patch_option,
    add_sampling_options,
    note_if_cut,
    open_model,
    read_patches,
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
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate a completion. If possible, bad input raises before the model is opened."""
    options = sampling_options(args)
    text = _read_stdin() if args.text == "-" else args.text
    if not text.strip():
        raise RequestError("the prompt is empty", field="TEXT", got=shown(text), wanted="text that is not blank")
    selection = read_patches(args.patch)
    model = open_model(args)
    stream = model.stream(text, system=args.system, raw=args.raw, patch=selection.choice, **options)
    if args.json:
        completion = "".join(stream)
        parts = selection.applied(model.graph.folder)
        print(
            json.dumps(
                {"text": completion, **_report(stream), "patches": [asdict(part) for part in parts], **_on(model)}
            )
        )
        return 0
    try:
        for chunk in stream:
            emit(chunk)
    finally:
        print(flush=True)  # also after an interruption, so that the next output begins on a new line
    note_if_cut(stream, options["max_new_tokens"])
    return 0


def _report(stream: TextStream) -> dict[str, Any]:
    first, steps = stream.seconds_to_first_token, len(stream.token_ids) - 1
    pace = None if first is None or steps < 1 else round(1000 * (stream.seconds - first) / steps, 3)
    return {
        "prompt_tokens": stream.prompt_tokens,
        "completion_tokens": len(stream.token_ids),
        "finish_reason": stream.finish_reason,
        "seconds_to_first_token": None if first is None else round(first, 6),
        "ms_per_token": pace,
    }


def _on(model: Any) -> dict[str, str]:
    device = model.graph.device
    return {"device": device.kind, "provider": device.provider}


def _read_stdin() -> str:
    """Return all of stdin without the newline at its end. The codec refuses bytes that are not UTF-8."""
    if sys.stdin is None:
        raise RequestError("stdin is closed", field="TEXT", got="-", wanted="text on stdin")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin.read().removesuffix("\n")
