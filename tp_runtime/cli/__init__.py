"""The command `tp-runtime`: one file for each subcommand. Results go to stdout, and everything else goes to stderr.

This room knows nothing of the host half, but `tp-export` runs its own subcommands with the same `run_program`. No
subcommand imports onnxruntime or opens a model before it runs, so that `--help` does not wait for them.
"""

from __future__ import annotations

from collections.abc import Sequence

from .program import run_program

__all__ = ["main", "run_program"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand of `tp-runtime`; see `run_program` for the arguments and the exit codes."""
    # The import is here, because `tp-export` needs only `run_program`.
    from . import absorb, bench, chat, generate, inspect, prepare, serve

    description = "Run a language model and switch thought patches on and off (edge side)."
    return run_program("tp-runtime", description, (generate, chat, serve, absorb, inspect, prepare, bench), argv)
