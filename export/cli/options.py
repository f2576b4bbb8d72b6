"""Options and checks that several commands share.

Everything here is quick, so that a bad argument is found before the minutes of work. Torch is imported only on demand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tp_runtime.errors import CalibrationError, DeviceUnavailableError, PatchFormatError, library_text, printable
from tp_runtime.storage import check_output_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tp_runtime.patch import Patch
    from tp_runtime.session import Graph

    from ..queries import SystemMessages
    from ..source import Source

# The system messages of queries on which a patch is measured, without --system-messages.
MEASURED_BEHIND = "for entries made with --before-system the built-in messages; for others none"

# -- arguments -------------------------------------------------------------------------------------------------


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add SRC."""
    parser.add_argument(
        "src",
        metavar="SRC",
        help="the base model: a Hugging Face folder (such as the command fetch writes) or a hub id",
    )


def add_context_options(parser: argparse.ArgumentParser) -> None:
    """Add --prompt and --prompt-file."""
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", help="the system prompt or context")
    text.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file with the system prompt or context")


def add_answer_length(parser: argparse.ArgumentParser) -> None:
    """Add --max-new-tokens."""
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=48,
        metavar="N",
        help="the largest number of tokens of the teacher's answers (default 48)",
    )


def add_stop(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --stop; `default` says what counts without it."""
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help=f"end every answer at the first TEXT; may be repeated (default: {default})",
    )


def add_system_messages(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --system-messages; `default` says which ones count without it."""
    parser.add_argument(
        "--system-messages",
        type=Path,
        metavar="FILE",
        help="a file of system messages that the queries have behind the prompt, one per line, or a .json or .jsonl "
        f"file; the last quarter is held out (default: {default})",
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument(
        "--device",
        default="auto",
        help="the torch device: auto (default; a GPU if there is one), cpu, cuda, cuda:1, ..., or map (the layers are "
        "spread over all GPUs)",
    )


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add --device and --offload."""
    add_device_option(parser)
    parser.add_argument(
        "--offload",
        action="store_true",
        help="leave the layers on disk and load one at a time, for models that are larger than the memory",
    )


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add --overwrite."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing OUT once the new folder is complete; this command must have written it, and it must "
        "hold nothing else",
    )


# -- checks ----------------------------------------------------------------------------------------------------


def require_at_least(field: str, value: int, least: int) -> None:
    """Raise CalibrationError if an option's value is smaller than `least`."""
    if value < least:
        raise CalibrationError("the number is too small", field=field, got=value, wanted=f"at least {least}")


def require_folder_of(field: str, path: Path) -> None:
    """Raise CalibrationError if the folder in which `path` is to be written does not exist."""
    if not path.resolve().parent.is_dir():
        raise CalibrationError(
            "the folder does not exist", field=field, got=str(path.parent), fix="create the folder first"
        )


def check_patch_file(path: Path, inputs: Iterable[str | Path]) -> None:
    """Check that a patch file can be written at `path` by a command that reads `inputs`.

    Raises:
        PatchFormatError: the name does not end in .safetensors.
        OutputError: see `check_output_file`.
    """
    from tp_runtime.patch import PATCH_FILE

    if path.suffix != ".safetensors":
        raise PatchFormatError(
            "the output file's name does not end in .safetensors", field="OUT", got=path.name, wanted="*.safetensors"
        )
    if not path.parent.is_dir():
        raise PatchFormatError(
            "the folder does not exist", field="OUT", got=str(path.parent), fix="create the folder first"
        )
    check_output_file(path, PATCH_FILE, inputs)


def given(*inputs: str | Path | None) -> list[str | Path]:
    """Return the inputs that the command line gives, for the check of its output."""
    return [path for path in inputs if path is not None]


def check_measurable(
    patch: Patch, name: str, context: str | None, queries: Sequence[str], source: Source, graph: Graph | None
) -> None:
    """Check that a patch can be measured on these queries, and note on stderr if its prompt is another one.

    Args:
        patch: the patch.
        name: the name of the patch in the note.
        context: the prompt that the patch replaces; None for a patch that only repairs a quantised base.
        queries: the held-out queries.
        source: the base model.
        graph: the exported graph that runs the student; None if torch does.

    Raises:
        CalibrationError: the patch was fitted on one of the queries.
        BaseMismatchError: the patch was fitted on another base or precision.
        PatchError: the patch does not fit the graph.
    """
    from tp_runtime.patch import context_digest
    from tp_runtime.session import check_base

    from ..queries import check_unfitted

    check_unfitted(queries, (patch.config.calibration or {}).get("query_digests", ()))
    if context is not None and patch.config.context_digest not in ("", context_digest(context)):
        print(f"note: {printable(name)} was fitted on another prompt than the one given", file=sys.stderr)
    precision = "fp32" if graph is None else graph.folder.precision
    check_base(patch, source.name, source.digest, precision, source.digest_change)
    if graph is not None:
        graph.bind(patch)


def stop_strings(given: Sequence[str] | None, patch: Patch | None = None) -> tuple[str, ...]:
    """Return the stop strings of --stop; without the option those that the patch was fitted with.

    Raises:
        CalibrationError: a stop string is empty or not valid Unicode.
    """
    if given is None:
        return () if patch is None else patch.config.stop
    if "" in given:
        raise CalibrationError("the stop string is empty", field="--stop", got="''", wanted="text")
    return tuple(valid_text("--stop", text) for text in given)


def system_messages(args: argparse.Namespace, before_system: bool, wanted: str) -> SystemMessages | None:
    """Return the system messages that queries have of their own; None if the prompt stands in place of them.

    Args:
        args: the arguments, with `system_messages`.
        before_system: whether the prompt stands in front of a system message.
        wanted: what makes it so, for the error.

    Raises:
        CalibrationError: messages are given, and the prompt stands in their place; or the file cannot be read.
    """
    from ..queries import load_system_messages

    if before_system:
        return load_system_messages(args.system_messages)
    if args.system_messages is not None:
        raise CalibrationError(
            "the prompt stands in place of a system message",
            field="--system-messages",
            got=str(args.system_messages),
            wanted=f"{wanted} beside it",
        )
    return None


def patch_system_messages(args: argparse.Namespace, patch: Patch) -> SystemMessages | None:
    """Return the system messages that queries have of their own where a patch is measured; None if they have none.

    Entries say where they stand. Weights do not, so given messages say that these were fitted behind some.

    Raises:
        CalibrationError: see `system_messages`.
    """
    before_system = args.system_messages is not None if patch.prefix is None else patch.before_system
    return system_messages(args, before_system, "a patch that was made with --before-system")


# -- reading ---------------------------------------------------------------------------------------------------


def read_context(args: argparse.Namespace) -> str:
    """Return the context text.

    The newlines at the end of a file are left out: text editors add them, and they are not part of the prompt.

    Raises:
        CalibrationError: neither option was given, or the file is not UTF-8 text.
        OSError: the file cannot be read.
    """
    context = read_any_context(args)
    if context is None:
        raise CalibrationError("no prompt is given", field="--prompt", wanted="--prompt TEXT or --prompt-file FILE")
    return context


def read_any_context(args: argparse.Namespace) -> str | None:
    """Return the context text, or None if neither option was given; errors are those of `read_context`."""
    if args.prompt is None and args.prompt_file is None:
        return None
    return read_prompt_file(args.prompt_file) if args.prompt is None else valid_text("--prompt", args.prompt)


def valid_text(field: str, text: str) -> str:
    """Return the text of an option. A byte of the command line that is not UTF-8 is half of a surrogate pair in it.

    Raises:
        CalibrationError: the text is not valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            "the text is not valid Unicode", field=field, got=ascii(text[error.start]), wanted="UTF-8 text"
        ) from error
    return text


def read_prompt_file(path: Path) -> str:
    """Return the text of a prompt file without the newlines at its end; errors are those of `read_context`."""
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            "the file cannot be read", field=str(path), got=library_text(error), wanted="UTF-8 text"
        ) from error


def open_graph(folder: Path | None) -> Graph | None:
    """Open the exported folder of --runtime in a session, if it was given.

    Raises:
        ModelError: see ModelFolder.open and Graph.
    """
    from tp_runtime.session import Graph, ModelFolder

    return None if folder is None else Graph(ModelFolder.open(folder))


def load_weights(source: Source, args: argparse.Namespace, dtype: str = "float32") -> Any:
    """Load the transformers model of `source` on --device, with --offload if the command has it.

    Raises:
        DeviceUnavailableError: torch cannot use the device.
        ModelFormatError: the weights are missing or damaged.
    """
    from ..progress import clock
    from ..source import load_model

    device = torch_device(args.device)
    with clock("load weights"):
        return load_model(source, device, dtype, offload=getattr(args, "offload", False))


def torch_device(requested: str) -> str:
    """Return the torch device for `auto`, `cpu`, `cuda`, ...

    Raises:
        DeviceUnavailableError: torch cannot use the device.
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
            f"torch cannot use the device: {library_text(error)}",
            field="--device",
            got=requested,
            wanted="auto, cpu, or a device torch has",
            fix="use --device cpu, or install a torch build for this device",
        ) from error
    return requested
