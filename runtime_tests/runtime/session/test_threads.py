"""One pool of threads for all sessions. A process has the pool or not, so each test runs in a separate process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tp_runtime

START = """
import os, sys
from tp_runtime import PatchedModel, share_threads
from tp_runtime.errors import RequestError

def count():
    return len(os.listdir("/proc/self/task"))

def open_model(**options):
    return PatchedModel.from_pretrained(sys.argv[1], "cpu", **options)

def refused(call, field):
    try:
        call()
    except RequestError as error:
        assert error.field == field and error.wanted, error
    else:
        raise AssertionError("not refused")
"""


def run(code: str, path: Path) -> None:
    where = str(Path(tp_runtime.__file__).parents[1])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {where!r})\n{START}\n{code}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads where Linux lists them")
def test_sessions_share_one_pool(tiny_llama_export: Path) -> None:
    run(
        """
import onnxruntime  # starts a thread of its own
before = count()
share_threads(4)
models = [open_model(huge_pages=False) for _ in range(3)]  # huge pages would use a thread for a moment
texts = [model.generate("Hi", max_new_tokens=4) for model in models]
assert len(set(texts)) == 1
assert count() == before + 3, (before, count())  # the calling thread is the fourth of the pool
""",
        tiny_llama_export,
    )


def test_sharing_is_set_once_and_excludes_the_options_threads_and_spin(tiny_llama_export: Path) -> None:
    run(
        """
for bad in (0, -1, True, 2.0, None, "2"):
    refused(lambda: share_threads(bad), "threads")
share_threads(2)
share_threads(2)
refused(lambda: share_threads(3), "share_threads")
refused(lambda: open_model(threads=2), "threads")
refused(lambda: open_model(spin=False), "spin")
model = open_model()
share_threads(2)
refused(lambda: share_threads(1), "share_threads")
assert model.generate("Hi", max_new_tokens=2) is not None
""",
        tiny_llama_export,
    )


def test_threads_cannot_be_shared_after_a_model_was_opened(tiny_llama_export: Path) -> None:
    run(
        """
model = open_model(threads=1)
refused(lambda: share_threads(2), "share_threads")
assert open_model(threads=2).generate("Hi", max_new_tokens=2) == model.generate("Hi", max_new_tokens=2)
""",
        tiny_llama_export,
    )


def test_idle_threads_wait_actively_or_sleep(tiny_llama_export: Path) -> None:
    run(
        """
key = "session.intra_op.allow_spinning"
active, asleep = open_model(), open_model(spin=False, threads=2)
assert asleep.graph.session.get_session_options().get_session_config_entry(key) == "0"
assert active.generate("Hi", max_new_tokens=2) == asleep.generate("Hi", max_new_tokens=2)
refused(lambda: open_model(spin=0), "spin")
""",
        tiny_llama_export,
    )
