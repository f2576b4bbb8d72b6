"""Starts worker processes, sends them commands, and stops each one while another is measured.

The threads of ONNX Runtime and OpenMP spin for a while after a run. To switch that off would change what is measured.
Instead, SIGSTOP stops every worker that has no command to answer, and no two workers ever run at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import Any

_SECONDS = 1800  # the longest wait for one answer; after it the worker counts as hung
_PR_SET_PDEATHSIG = 1


class WorkerError(Exception):
    """A worker answered with an error, did not answer, or ended."""


class Process:
    """One worker process. SIGSTOP stops it after each answer until its next command.

    Args:
        module: the name of the worker's module in this package.
        threads: the number of threads for the libraries that read it from the environment.

    Attributes:
        started: the value of `time.perf_counter()` just before the process started.
    """

    def __init__(self, module: str, threads: int) -> None:
        # The log is a file, because a pipe that nobody reads fills up and blocks the worker.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.speed.{module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            preexec_fn=_die_with_parent,
        )

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        """Let the worker run until it has answered one command.

        Raises:
            WorkerError: the worker answers with an error, does not answer in time, or has ended.
        """
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"do": do, **command}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise WorkerError(f"the process ended: {self._exit_reason()}")
        self._process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        descriptor, line = self._process.stdout.fileno(), b""
        while not line.endswith(b"\n"):
            if not select.select([descriptor], [], [], _SECONDS)[0]:
                raise WorkerError(f"no answer in {_SECONDS} s")
            block = os.read(descriptor, 1 << 20)
            if not block:
                break
            line += block
        return line

    def _exit_reason(self) -> str:
        self._process.wait()
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"exit code {self._process.returncode}, {lines[-1].strip() if lines else 'nothing on stderr'}"

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # SIGKILL also ends a stopped process
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._log.close()


def _die_with_parent() -> None:
    """Ask Linux to kill this worker with its driver, so that no stopped worker keeps gigabytes of memory."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
