"""Time the text side of an exported folder with the tables of its tokenizer and with tokenizer.json, in new processes.

    python -m benchmarks.tokenizer_tables MODEL_DIR

For each of the two it prints the median time to open the tokenizer, the time of the first text, and the memory of the
process that no file backs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.speed.protocol import memory
from tp_runtime.session import ModelFolder
from tp_runtime.text import TextCodec

_ROUNDS = 5
_TEXT = "The quick brown fox jumps over the lazy dog."


def measure(folder: Path, tables: bool) -> dict[str, float]:
    """Open the text side in this process and encode one text."""
    opened = ModelFolder.open(folder, digests=False)
    before = memory()["anonymous"]
    start = time.perf_counter()
    codec = TextCodec.from_model_folder(opened)
    if not tables:
        codec.load_tokenizer()
    ready = time.perf_counter()
    codec.render(_TEXT, raw=True)
    ended = time.perf_counter()
    return {"open": ready - start, "text": ended - ready, "bytes": memory()["anonymous"] - before}


def main() -> None:
    """Run both in turn and print the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=["tables", "json"], help="measure one of them in this process")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.folder, args.only == "tables")))
        return
    found: dict[str, list[dict[str, float]]] = {"tables": [], "json": []}
    for _ in range(_ROUNDS):
        for kind, samples in found.items():
            command = [sys.executable, "-m", "benchmarks.tokenizer_tables", str(args.folder), "--only", kind]
            samples.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    for kind, samples in found.items():
        opened, text, size = (median(sample[key] for sample in samples) for key in ("open", "text", "bytes"))
        print(f"{kind:6}  opened in {1e3 * opened:7.1f} ms  first text {1e3 * text:5.1f} ms  {size / 2**20:5.0f} MiB")


if __name__ == "__main__":
    main()
