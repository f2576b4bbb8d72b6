"""Exports a base model without patch slots, so that `python -m benchmarks.speed` can measure what empty slots cost.

    python benchmarks/slotless.py SOURCE OUT [--precision fp32]

The product has no such option, because no patch fits a graph without slots. The graph serves only this comparison.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

from tp_export.decoder import SLOT_SETS
from tp_export.graph import export_model
from tp_export.source import open_source


def main() -> None:
    """Export one folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--precision", default="fp32")
    args = parser.parse_args()
    cast(dict[str, Any], SLOT_SETS)["none"] = lambda block: ()
    print(export_model(open_source(args.source), args.out, slot_set="none", precision=args.precision))


if __name__ == "__main__":
    main()
