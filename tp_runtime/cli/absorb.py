"""`tp-runtime absorb` writes a system prompt's own keys and values as a patch file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import PatchFormatError, RequestError
from ..patch import PATCH_FILE
from ..storage import check_output_file
from .options import add_model_options, add_patch_option, open_model, read_patches, read_text, split_spec
from .printing import note, plural, size

_DTYPES = ("f32", "f16", "i8")
_LONGEST_TEXT = 2**24  # bytes; several times the longest context window


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser."""
    parser = subparsers.add_parser(
        "absorb",
        help="write a system prompt's own keys and values as a patch",
        description="Run a system prompt once and write its keys and values as a patch file. A process that runs under "
        "this patch answers as behind the prompt, and its first token comes as soon as without one. The patch runs on "
        "the precision of MODEL, and holds the weights that were active: those of --patch, of the folder's default "
        "patch and of its repair. The command prints the path of the file.",
    )
    add_model_options(parser, capturable=False)
    parser.add_argument("out", metavar="OUT.safetensors", type=Path, help="the patch file to write")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument(
        "--system", metavar="TEXT", help="the system message; for a completion-style model, text in front of a prompt"
    )
    text.add_argument(
        "--system-file", type=Path, metavar="FILE", help="a UTF-8 file with this text; newlines at its end do not count"
    )
    add_patch_option(parser)
    parser.add_argument(
        "--before-system",
        action="store_true",
        help="let the text stand in front of a system message that every request has of its own, not in place of one",
    )
    parser.add_argument("--name", help="the name of the patch (default: the file's name)")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="the dtype of the file (default: that in which MODEL computes keys and values, f32 or f16, which is "
        "exact); f16 halves a file of f32 and i8 quarters it, and both round",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compute the patch, write it and print its path. Bad input raises before the model is opened."""
    if args.out.suffix != ".safetensors":
        raise PatchFormatError(
            "the output file's name does not end in .safetensors",
            field="OUT",
            got=args.out.name,
            wanted="*.safetensors",
        )
    read = [args.model, args.system_file, *(split_spec(spec)[0] for spec in args.patch)]
    check_output_file(args.out, PATCH_FILE, [path for path in read if path is not None])
    system = args.system if args.system_file is None else _prompt(args.system_file)
    if not system.strip():
        field = "--system" if args.system_file is None else str(args.system_file)
        raise RequestError("the prompt to absorb is empty", field=field, got=repr(system), wanted="text")
    selection = read_patches(args.patch)
    model = open_model(args)
    name = args.out.stem if args.name is None else args.name
    with _progress() as progress:
        patch = model.absorb(
            system, name, patch=selection.choice, dtype=args.dtype, before_system=args.before_system, progress=progress
        )
    patch.save(args.out)
    assert patch.prefix is not None
    under = selection.describe(model.graph.folder)
    note(f"absorbed {plural(patch.prefix.position, 'token')} under {under}: {size(patch.nbytes)} in {patch.dtype}")
    print(args.out)
    return 0


def _prompt(file: Path) -> str:
    """Return the text of a file without the newlines at its end, as the exporter reads a prompt."""
    return read_text(file, str(file), _LONGEST_TEXT).rstrip("\r\n")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function that shows on a terminal how much of the prompt has run; None where nobody would see it."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    try:
        yield lambda done, whole: print(
            f"\rrun the prompt: {done} of {whole} tokens", end="", file=sys.stderr, flush=True
        )
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
