"""Prints what a decode step of a model folder asks of a GPU, as the stand-in counts it.

python -m runtime_tests.gpu.standin MODEL_DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from runtime_tests.gpu.standin.environment import make_standin

COLUMNS = ("launches", "replays", "bytes_in", "bytes_out", "allocations")


def main(folder: str) -> None:
    found = json.loads(make_standin().run("-m", "runtime_tests.gpu.standin.inside", str(Path(folder).resolve())))
    for provider, operators in found["placement"].items():
        print(f"{provider}: {len(operators)} nodes")
    print(f"captures: {found['capture']['captures']}, failure: {found['capture']['failure']}")
    print("  ".join(f"{name:>11}" for name in ("captured", "rank", "request", *COLUMNS)))
    last = max(step["number"] for step in found["steps"])
    for step in found["steps"]:
        if step["number"] == last:
            values = step["captured"], step["rank"], step["request"], *(step[name] for name in COLUMNS)
            print("  ".join(f"{value!s:>11}" for value in values))
    for switch in found["switches"]:
        print(f"switch to rank {switch['rank']}: {switch['first']['bytes_in']} bytes in of {switch['bytes']}")


if __name__ == "__main__":
    main(sys.argv[1])
