"""Builds graphs with onnxruntime-genai's own builder, for `python -m benchmarks.speed` to compare with.

    BUILDER_PYTHON benchmarks/genai_graphs.py SOURCE OUT [--precisions fp32,int8,int4]
    BUILDER_PYTHON benchmarks/genai_graphs.py SOURCE OUT --device cuda [--precisions fp16,int4]

SOURCE is a folder that `tp-export fetch` prints. OUT receives one folder for each precision. The builder needs
transformers 5, which the export extra cannot have, so it needs its own environment:

    python3 -m venv build/builder
    build/builder/bin/pip install torch==2.13.0 "transformers>=5" onnx onnx_ir onnxruntime onnxruntime-genai==0.18.0

For int8 and int4 the script uses the builder's fastest options on a CPU: blocks of 32 and activations in 8 bits
(accuracy level 4). For CUDA it leaves the activations in float16.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path

PRECISIONS = {"cpu": ("fp32", "int8", "int4"), "cuda": ("fp16", "int4")}
_BLOCKS = "block_size=32"
_QUANTISED = {"cpu": ("--extra_options", "accuracy_level=4", _BLOCKS), "cuda": ("--extra_options", _BLOCKS)}
_WEIGHTS = "model.safetensors"


@contextmanager
def readable(source: Path) -> Iterator[Path]:
    """Yield the source in a form that the builder reads; by itself it finds neither of Gemma 3's two rotary bases."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "gemma3_text":
        yield source
        return
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / source.name
        # A link to the weights avoids a copy of a gigabyte.
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns(_WEIGHTS))
        (copy / _WEIGHTS).symlink_to((source / _WEIGHTS).resolve())
        whole, local = config.pop("rope_theta"), config.pop("rope_local_base_freq")
        config["rope_parameters"] = {
            "full_attention": {"rope_type": "default", "rope_theta": whole},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
            # The builder reads these keys one level above the place where transformers puts them.
            "rope_type": "default",
            "rope_theta": whole,
            "rope_local_base_freq": local,
        }
        (copy / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        yield copy


def build(source: Path, out: Path, precision: str, device: str) -> None:
    """Build one graph; a complete folder that exists already stays as it is."""
    if (out / "genai_config.json").exists():
        print(f"{out} exists already", file=sys.stderr)
        return
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch, readable(source) as folder:
        options = _QUANTISED[device] if precision.startswith("int") else ()
        command = ["-i", str(folder), "-o", str(out), "-p", precision, "-e", device, "-c", scratch, *options]
        # The file runs by its path, because importing the package also loads genai itself, which building does not use.
        package = util.find_spec("onnxruntime_genai")
        if package is None or package.origin is None:
            raise SystemExit("error: onnxruntime-genai is not installed")
        builder = Path(package.origin).parent / "models" / "builder.py"
        subprocess.run([sys.executable, str(builder), *command], check=True)


def main() -> None:
    """Build every precision of one model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=list(PRECISIONS), default="cpu")
    parser.add_argument("--precisions", help="default: all of the device")
    args = parser.parse_args()
    known = PRECISIONS[args.device]
    for precision in args.precisions.split(",") if args.precisions else known:
        if precision not in known:
            parser.error(f"{precision!r} is not one of {', '.join(known)}")
        build(args.source, args.out / precision, precision, args.device)


if __name__ == "__main__":
    main()
