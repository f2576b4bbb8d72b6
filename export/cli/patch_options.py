"""The options of `tp-export patch` on one patch: what it is fitted on, its form, its size and its file.

Most options that depend on each other have no default in the parser, because the run has to know whether they were
given. HELD_OUT and RANK are the numbers that count where --holdout and --rank were not.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from .options import (
    add_answer_length,
    add_context_options,
    add_device_options,
    add_source,
    add_stop,
    add_system_messages,
)

HELD_OUT = 16
RANK = 16
_CALIBRATION_QUERIES = 64


def add_fit_options(parser: argparse.ArgumentParser) -> None:
    """Add SRC, OUT and the options on one patch."""
    add_source(parser)
    parser.add_argument("out", metavar="OUT.safetensors", type=Path, help="the patch file to write")
    add_context_options(parser)
    add_device_options(parser)
    parser.add_argument(
        "--queries",
        type=Path,
        metavar="FILE",
        help="a file of queries, one per line, or a .json or .jsonl file (default: the built-in questions, and for a "
        "long prompt of a chat model as many that the model writes about it)",
    )
    parser.add_argument(
        "--held-out", type=Path, metavar="FILE", help="a file of queries to measure on, instead of --holdout"
    )
    parser.add_argument(
        "--holdout",
        type=int,
        metavar="N",
        help=f"how many queries are held out of the fit (default {HELD_OUT}); with --held-out, how many of its first "
        "queries are measured (default: all)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=_CALIBRATION_QUERIES,
        metavar="N",
        help=f"the largest number of queries to fit on (default {_CALIBRATION_QUERIES})",
    )
    parser.add_argument(
        "--method",
        choices=("vector", "output", "matrix", "lora", "prefix", "isotropic"),
        help="the form of the weights (default: output with --rank, otherwise prefix); output gives weights alone "
        "unless --prefix adds entries: such a patch has any strength, adds to every other patch and travels to other "
        "formats; a lora patch is added to the output of the MLP's last linear layer, for the LoRA export of "
        "Gemma-like models; a prefix patch has entries and no weights, see --prefix; isotropic is a baseline for "
        "comparison",
    )
    parser.add_argument(
        "--no-bias",
        action="store_true",
        help="with --method lora: fit a pair of factors without a bias, for engines whose LoRA has no bias (vLLM) and "
        "for merging",
    )
    parser.add_argument(
        "--first-layer",
        type=int,
        default=0,
        metavar="N",
        help="leave the layers below N unpatched (default 0); control vectors of llama.cpp begin at layer 1",
    )
    parser.add_argument("--rank", type=int, help="the rank of each pair of factors (default 16 where there are any)")
    parser.add_argument(
        "--ridge",
        type=float,
        help="the ridge of the weights, relative to the mean diagonal of the Gram matrix (default 1)",
    )
    parser.add_argument(
        "--prefix",
        type=_entries,
        metavar="N",
        help="compact the prompt to N key/value entries for each head of a layer, on average over the layers; `all` "
        "keeps every entry, which is exact (but for --dtype i4); 0 gives weights alone",
    )
    parser.add_argument(
        "--before-system",
        action="store_true",
        help="let the prompt stand in front of a system message that every request has of its own, with a blank line "
        "between them, not in place of one",
    )
    add_system_messages(parser, "with --before-system built-in messages")
    parser.add_argument(
        "--target",
        type=float,
        metavar="SHARE",
        help="find the smallest file that reaches this share of the prompt's effect, such as 0.95, on a part of the "
        "calibration queries that is kept for the choice",
    )
    parser.add_argument(
        "--max-bytes",
        type=_size,
        metavar="SIZE",
        help="the largest size of the file, such as 2MB; without --target the best file of that size",
    )
    parser.add_argument(
        "--best", action="store_true", help="write the best file that was found if none reaches --target"
    )
    parser.add_argument(
        "--dtype",
        choices=("i4", "i8", "f16", "bf16", "f32"),
        help="the dtype of entries and factors in the file (default: i8, with scales, which costs at most 0.002 of the "
        "prompt's effect; with --target or --max-bytes i4 or i8, whichever serves better). i4 holds twice as many "
        "entries in the same bytes, fitted for it; factors are i8 beside them",
    )
    parser.add_argument(
        "--no-restating",
        action="store_true",
        help="fit the answers to the queries only; otherwise a long prompt of a chat model is repeated and echoed too, "
        "so that the fit sees all of it",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=2,
        metavar="N",
        help="the number of answers to each query to fit on; one is greedy and the others are sampled (default 2)",
    )
    add_answer_length(parser)
    add_stop(parser, "none; the file remembers it, and the runtime stops there too")
    parser.add_argument(
        "--rollouts",
        type=Path,
        metavar="FILE.jsonl",
        help="store the teacher's answers in this file, and reuse those that it already has",
    )
    parser.add_argument(
        "--save-queries",
        type=Path,
        metavar="FILE.jsonl",
        help="save the queries that the patch is fitted on, which the model writes in part, in this new file: for "
        "--queries here, and for --calibration of tp-export report",
    )
    parser.add_argument(
        "--refine",
        type=int,
        default=0,
        metavar="STEPS",
        help="improve the closed form by this many gradient steps on the same parameters (default 0)",
    )
    parser.add_argument(
        "--student-precision",
        default="fp32",
        metavar="PRECISION",
        help="fit on the base as an export of this precision computes it (int8, int4, int4-rtn, ...), so that the "
        "patch also repairs what quantisation costs; without a prompt the patch is only a repair (default: fp32, for "
        "every precision)",
    )
    parser.add_argument(
        "--student",
        type=Path,
        metavar="FOLDER",
        help="fit behind the weights of this exported folder: as --student-precision with its precision, but with "
        "exactly its weights, which a calibrated precision (int4-gptq) does not give again on every machine",
    )
    parser.add_argument("--name", help="the name of the patch (default: the file's name)")
    parser.add_argument("--store-prompt", action="store_true", help="store the prompt's text in the patch file")


def _entries(text: str) -> int:
    """Return the number of entries that --prefix names."""
    from ..fit import ALL

    if text == "all":
        return ALL
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number of entries, or all")
    return int(text)


def _size(text: str) -> int:
    """Return the number of bytes that --max-bytes names, with the decimal units kB, MB and GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a size such as 500kB or 2MB")
    return int(float(found[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[found[2].lower()])
