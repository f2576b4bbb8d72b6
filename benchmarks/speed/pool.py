"""Worker processes: started, asked, and stopped while another one is measured.

ONNX Runtime's and OpenMP's threads spin for a while after a run. Turning that off would change what is measured, so
every worker that is not being asked is stopped with SIGSTOP instead, and no two ever run at once.
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

_SECONDS = 1800  # for one answer, before a worker is taken for hung
_PR_SET_PDEATHSIG = 1


class WorkerError(Exception):
    """What a worker answered instead of a result, or how it died."""


class Process:
    """One worker, stopped from its start except while it is asked.

    Args:
        module: a module of this package.
        threads: for the libraries that read it from the environment.

    Attributes:
        started: `time.perf_counter()` just before the process was made.
    """

    def __init__(self, module: str, threads: int) -> None:
        # A file: a pipe that nobody reads fills, and blocks whoever logs.
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
        """Let it run until it has answered one command.

        Raises:
            WorkerError: it answered with an error, or is gone.
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
            raise WorkerError(f"the process ended: {self._last_words()}")
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

    def _last_words(self) -> str:
        self._process.wait()
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"exit code {self._process.returncode}, {lines[-1].strip() if lines else 'nothing on stderr'}"

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # a stopped process hears nothing else
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._log.close()


def _die_with_parent() -> None:
    """A driver that is killed must not leave stopped gigabytes behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
