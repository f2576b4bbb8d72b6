"""This module makes the environment in which ONNX Runtime's CUDA provider runs without a GPU, once for all tests.

The environment is below the user's cache folder: a virtual environment with the GPU build of ONNX Runtime and none of
NVIDIA's libraries, CUDA's headers, and the stand-in for the libraries (standin.c), compiled for exactly that build. The
first use downloads about 260 MB. `make_standin` says why, if this machine cannot have it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tp_runtime.storage import user_folder

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PROVIDER = "libonnxruntime_providers_cuda.so"
# Pinned, because the counts that the tests state are those of its kernels.
GPU_BUILD = "onnxruntime-gpu==1.31.1"
# They are not installed into the environment: ONNX Runtime would prefer the library in the first one to the stand-in.
HEADERS = ("nvidia-cuda-runtime==13.0.*", "nvidia-cuda-crt==13.0.*")
TOOLS = ("gcc", "nm", "readelf")
CACHE = user_folder("tests", "cuda-standin")  # found before a test gives the user another home


class Unavailable(Exception):
    """This machine cannot have the stand-in; the message says why."""


@dataclass(frozen=True)
class StandIn:
    """The environment.

    Attributes:
        python: its interpreter.
        library: the stand-in for CUDA's libraries.
    """

    python: Path
    library: Path

    def run(self, *arguments: str, timeout: float = 300) -> str:
        """Run the interpreter with arguments, from the project's folder; return what it prints.

        Raises:
            AssertionError: it failed; the message is what it wrote to stderr.
        """
        where = {"LD_LIBRARY_PATH": str(self.library.parent), "PYTHONPATH": str(ROOT), "TP_STANDIN": str(self.library)}
        done = subprocess.run(
            [str(self.python), *arguments],
            env={**os.environ, **where},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-4000:]}"
        return done.stdout


def make_standin() -> StandIn:
    """Return the environment, and make what the cache folder lacks of it.

    Raises:
        Unavailable: the machine is of another kind, lacks a tool, or cannot install a package.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Unavailable(f"the stand-in is for Linux on x86_64, not {platform.system()} on {platform.machine()}")
    for tool in TOOLS:
        if shutil.which(tool) is None:
            raise Unavailable(f"{tool} was not found")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = [GPU_BUILD, *project["dependencies"]]
    with _folder([*packages, sys.version]) as (folder, is_new):
        python = folder / "env" / "bin" / "python"
        if is_new:
            _run("the environment", sys.executable, "-m", "venv", "--without-pip", str(folder / "env"))
            _run("the GPU build of ONNX Runtime", *_pip(), "--python", str(python), "install", "--quiet", *packages)
            headers = ("install", "--quiet", "--no-deps", "--target", str(folder / "headers"))
            _run("CUDA's headers", *_pip(), *headers, *HEADERS)
    source = (HERE / "standin.c").read_text(encoding="utf-8")
    provider = next(folder.glob(f"env/lib/python*/site-packages/onnxruntime/capi/{PROVIDER}"))
    include = next(folder.glob("headers/nvidia/*/include"))
    with _folder([source, str(provider), Path(__file__).read_text(encoding="utf-8")]) as (built, is_new):
        if is_new:
            _compile(source, provider, include, built)
    return StandIn(python, built / "libstandin.so")


@contextmanager
def _folder(parts: list[str]) -> Iterator[tuple[Path, bool]]:
    """Hold the cache folder of what `parts` describe; say whether it is new and must be filled.

    A folder that was not filled to its end is emptied. Other processes wait meanwhile.
    """
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = CACHE / digest
    CACHE.mkdir(parents=True, exist_ok=True)
    complete = folder / "complete"
    with (CACHE / f"{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_new = not complete.exists()
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        yield folder, is_new
        complete.touch()


def _pip() -> tuple[str, ...]:
    return sys.executable, "-m", "pip", "--disable-pip-version-check"


def _run(what: str, *command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{what} could not be made: {(done.stderr.strip() or done.stdout.strip())[-300:]}")
    return done.stdout


def _compile(source: str, provider: Path, include: Path, out: Path) -> None:
    """Compile the stand-in, with a function that returns 0 for all that the provider imports and it does not define."""
    imported = [line.split()[-1].partition("@")[0] for line in _run("nm", "nm", "-Du", str(provider)).splitlines()]
    # The provider opens these two libraries when it needs them, and looks functions up by their names.
    looked_up = re.findall(rb"\0((?:cudnn|cufft)[A-Z][A-Za-z0-9_]+)(?=\0)", provider.read_bytes())
    names = {name for name in imported if re.match("(__)?cu", name)} | {name.decode() for name in looked_up}
    defined = set(re.findall(r"\b(?:PRODUCT\()?((?:__)?cu[A-Za-z0-9_]+)[()]", source))
    lines = [source]
    for name in sorted(names - defined):
        is_text = name.endswith(("String", "Name"))
        lines.append(f'const char *{name}() {{ return "stand-in"; }}' if is_text else f"r {name}() {{ return 0; }}")
    (out / "all.c").write_text("\n".join(lines), encoding="utf-8")
    library = out / "libstandin.so"
    _run("the stand-in", "gcc", "-shared", "-fPIC", "-w", f"-I{include}", "-o", str(library), str(out / "all.c"))
    needed = _run("readelf", "readelf", "-d", str(provider))
    for name in {*re.findall(r"\[(lib(?:cu|nv)[A-Za-z]+\.so\.[0-9]+)\]", needed), "libcudnn.so.9", "libcufft.so.12"}:
        (out / name).symlink_to(library.name)
