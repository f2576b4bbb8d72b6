"""Options that `patch`, `evaluate` and `verify` share: the text to absorb, and the device."""

from __future__ import annotations

import argparse
from pathlib import Path

from tp_runtime.errors import CalibrationError, DeviceUnavailableError, PatchFormatError


def add_context_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds --prompt and --prompt-file; `required`: one of them must be given."""
    text = parser.add_mutually_exclusive_group(required=required)
    text.add_argument("--prompt", metavar="TEXT", help="the system prompt or context")
    text.add_argument("--prompt-file", type=Path, metavar="FILE", help="the same, from a UTF-8 file")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Adds --device."""
    parser.add_argument(
        "--device",
        default="auto",
        help="for torch: auto (a GPU if there is one), cpu, cuda, cuda:1, ..., or map (spread over all GPUs)",
    )


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Adds --device and --offload."""
    add_device_option(parser)
    parser.add_argument(
        "--offload", action="store_true", help="leave the layers on disk and load one at a time: for models over memory"
    )


def read_context(args: argparse.Namespace) -> str:
    """The context text; the newline that ends a file is the editor's, not the prompt's.

    Raises:
        CalibrationError: neither option was given, or the file is not UTF-8 text.
        OSError: it cannot be read.
    """
    context = read_any_context(args)
    if context is None:
        raise CalibrationError("no prompt", field="--prompt", wanted="--prompt TEXT or --prompt-file FILE")
    return context


def read_any_context(args: argparse.Namespace) -> str | None:
    """The context text, or None where none was given; errors as of `read_context`."""
    if args.prompt is None and args.prompt_file is None:
        return None
    return read_prompt_file(args.prompt_file) if args.prompt is None else str(args.prompt)


def read_prompt_file(path: Path) -> str:
    """The text of a prompt file, without the newline that ends it; errors as of `read_context`."""
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"cannot be read: {error}", field=str(path), wanted="UTF-8 text") from error


def check_patch_file(path: Path) -> None:
    """Raise PatchFormatError unless a patch file can be written there."""
    if path.suffix != ".safetensors":
        raise PatchFormatError("the name of a patch file", field="OUT", got=path.name, wanted="*.safetensors")
    if not path.parent.is_dir():
        raise PatchFormatError("no such folder", field="OUT", got=str(path.parent), fix="make it first")


def torch_device(requested: str) -> str:
    """The torch device for `auto`, `cpu`, `cuda`, ...

    Raises:
        DeviceUnavailableError: it is not there.
    """
    import torch

    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if requested == "map":
        return requested
    try:
        torch.empty(1, device=requested)
    except (RuntimeError, AssertionError) as error:
        raise DeviceUnavailableError(
            f"torch cannot use it: {' '.join(str(error).split())}",
            field="--device",
            got=requested,
            wanted="auto, cpu, or a device torch has",
            fix="use --device cpu, or install a torch build for this device",
        ) from error
    return requested
