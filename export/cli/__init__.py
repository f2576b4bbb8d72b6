"""The command `tp-export`: one file for each subcommand. Results go to stdout, and everything else goes to stderr.

This room knows nothing of how the work is done: it reads arguments and prints results. No subcommand imports torch
before it runs, so that `--help` does not wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tp_runtime.cli import run_program

from . import adapter, check, control_vector, evaluate, fetch, import_, lora, model, patch, questions, report, verify

_COMMANDS = (fetch, model, questions, patch, evaluate, report, verify, check, lora, control_vector, adapter, import_)
_EXPORT = ("torch", "transformers", "onnx", "onnxscript", "optimum", "gguf", "accelerate", "tqdm")
_EXTRAS = {**dict.fromkeys(_EXPORT, "export"), "matplotlib": "export,report"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand of `tp-export`; the arguments and exit codes are those of `run_program`."""
    description = "Compute thought patches and export base models to ONNX. This is the host side."
    return run_program("tp-export", description, _COMMANDS, argv, _EXTRAS)
