"""The command `tp-runtime`: one file for each subcommand. Results go to stdout, and everything else goes to stderr.

No subcommand imports onnxruntime or opens a model before it runs, so `--help` is instant. `tp-export` runs its own
subcommands with the same `run_program`.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import bench, chat, generate, inspect, prepare
from .printing import note
from .program import run_program

__all__ = ["main", "note", "run_program"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand of `tp-runtime`; `run_program` documents the arguments and the exit codes."""
    description = "Run a language model and switch thought patches on and off. This is the edge side."
    return run_program("tp-runtime", description, (generate, chat, inspect, prepare, bench), argv)
