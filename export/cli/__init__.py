"""The command `tp-export`: one small file for each subcommand, results on stdout, the rest on stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tp_runtime.errors import TPError

from . import adapter, check, control_vector, evaluate, fetch, import_, lora, model, patch, questions, report, verify

# A command is a module with add_parser(subparsers), which sets `run` as a default; run(args) returns the exit
# code. None of them imports torch before run(): `--help` stays instant.
_COMMANDS = (fetch, model, questions, patch, evaluate, report, verify, check, lora, control_vector, adapter, import_)
# Packages of the extras; another missing module is a defect and keeps its traceback.
_EXPORT = ("torch", "transformers", "onnx", "onnxscript", "optimum", "gguf", "accelerate", "tqdm")
_EXTRA = {**dict.fromkeys(_EXPORT, "export"), "matplotlib": "export,report"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: the arguments, without the program's name; those of the process when None.

    Returns:
        The exit code: 0 done, 2 bad input, 1 the system refused (disk, missing package), 130 interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="tp-export", description="Compute thought patches and export base models to ONNX (host side)."
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except TPError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    except OSError as error:
        return _fail(str(error), 1)
    except ModuleNotFoundError as error:
        extra = _EXTRA.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _fail(f"{error.name} is not installed; run: pip install 'tp-runtime[{extra}]'", 1)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
