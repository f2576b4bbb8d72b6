"""The command `tp-runtime`: one small file for each subcommand, results on stdout, the rest on stderr.

No subcommand imports onnxruntime or opens a model before it runs, so `--help` stays instant. `tp-export` uses the same
program around its own subcommands.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import bench, chat, generate, inspect, prepare
from .printing import note
from .program import run_program

__all__ = ["main", "note", "run_program"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand of `tp-runtime`; arguments and exit codes are those of `run_program`."""
    description = "Run a language model and switch thought patches on and off (edge side)."
    return run_program("tp-runtime", description, (generate, chat, inspect, prepare, bench), argv)
