"""Options that several commands share: the device, patches with strengths, sampling."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from ..errors import PatchTargetError, PatchValueError, RequestError
from ..generation import Sampling
from ..model import ACTIVE, PatchChoice, PatchedModel, TextStream
from ..patch import Patch
from ..session import DEVICES, ModelFolder
from ..text import Request, SamplingOptions
from .printing import note, plural

NONE = "none"  # instead of a file: the base model, also where the folder has a default patch
_MAX_THREADS = 1024  # ONNX Runtime starts as many as it is told, until the system kills it


@dataclass(frozen=True)
class Part:
    """One patch of an expression."""

    name: str | None
    identity: str
    strength: float

    def __str__(self) -> str:
        return f"{self.name or self.identity[:12]}@{self.strength:g}"


@dataclass(frozen=True)
class Selection:
    """What a run is asked to run under, and what that is made of.

    Attributes:
        choice: for PatchedModel: a patch, None for the base, or ACTIVE for what the folder was exported with.
        parts: the patches `choice` adds up; none for None and ACTIVE.
    """

    choice: PatchChoice
    parts: tuple[Part, ...] = ()

    def applied(self, folder: ModelFolder, strength: float = 1.0) -> tuple[Part, ...]:
        """The patches that requests really run under, with the folder's default."""
        if self.choice is ACTIVE and folder.default_patch:
            default = folder.default_patch
            name = default.name if len(default.terms) == 1 else None  # a sum's name names none of its parts
            return tuple(Part(name, identity, factor * strength) for identity, factor in default.terms)
        return tuple(Part(part.name, part.identity, part.strength * strength) for part in self.parts)

    def describe(self, folder: ModelFolder, strength: float = 1.0) -> str:
        """`applied` in a line."""
        return " + ".join(map(str, self.applied(folder, strength))) or "no patch"


BASE = Selection(None)


# -- the model -------------------------------------------------------------------------------------------------


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, --device and --threads."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model folder written by tp-export")
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="auto takes CUDA if it is there, else the CPU, and says so"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of one operator (default: the cores there are)"
    )


def open_model(args: argparse.Namespace) -> PatchedModel:
    """The model of the command line in a session.

    Raises:
        RequestError: a number of threads that cannot be.
        ModelError: see PatchedModel.from_pretrained.
    """
    if args.threads is not None and not 1 <= args.threads <= _MAX_THREADS:
        raise RequestError("not a number of threads", field="threads", got=args.threads, wanted=f"1..{_MAX_THREADS}")
    return PatchedModel.from_pretrained(args.model, args.device, threads=args.threads)


# -- patches ---------------------------------------------------------------------------------------------------


def add_patch_option(parser: argparse.ArgumentParser) -> None:
    """--patch, which may be repeated."""
    parser.add_argument(
        "--patch",
        action="append",
        default=[],
        metavar="FILE[@STRENGTH]",
        help="run under this patch, scaled by STRENGTH (default 1; may be negative); several add up. "
        f"'{NONE}' is the base model. Default: what the folder was exported with",
    )


def read_patches(specs: Sequence[str]) -> Selection:
    """Reads patch files and adds them up: s1*p1 + s2*p2.

    Args:
        specs: FILE or FILE@STRENGTH each, or `none` alone.

    Raises:
        PatchError: a file that is not a patch, a strength that is not a number, patches that cannot be added.
    """
    if not specs:
        return Selection(ACTIVE)
    if list(specs) == [NONE]:
        return BASE
    if NONE in specs:
        raise PatchTargetError(
            f"{NONE!r} is the base model and adds to nothing",
            field="patch",
            got=" ".join(specs),
            fix=f"leave it out, or write ./{NONE} if a file is called so",
        )
    terms, parts = [], []
    for file, strength in map(split_spec, specs):
        patch = Patch.load(file)
        terms.append(strength * patch)
        parts.append(Part(patch.name, patch.identity, float(strength)))
    return Selection(reduce(add, terms), tuple(parts))


def split_spec(spec: str) -> tuple[str, float]:
    """FILE[@STRENGTH] in its parts; a file whose name has an @ in it is found as well.

    Raises:
        PatchValueError: the file is there, and what follows its @ is no number.
    """
    file, at, factor = spec.rpartition("@")
    if not at or os.path.exists(spec):
        return spec, 1.0
    try:
        return file, float(factor)
    except ValueError:
        if not os.path.exists(file):
            return spec, 1.0  # a name with an @ that is not there: the reader says so
        raise not_a_strength(factor) from None


def parse_strength(text: str) -> float:
    """A strength from text; the patch itself refuses NaN and what float32 cannot hold.

    Raises:
        PatchValueError: it is no number.
    """
    try:
        return float(text)
    except ValueError:
        raise not_a_strength(text) from None


def not_a_strength(text: str) -> PatchValueError:
    """The error for text where a strength should be."""
    return PatchValueError("not a strength", field="strength", got=repr(text), wanted="a number, such as 0.5 or -1")


# -- sampling --------------------------------------------------------------------------------------------------


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are picked and when to stop."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most N tokens (default 256)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0 (default): all")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that sum to P")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="drop what is below P times the likeliest")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: repeat less")
    group.add_argument("--seed", type=int, metavar="N", help="makes draws repeatable")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """Keyword arguments for PatchedModel.stream; bad ones are refused here, before seconds go into opening a model.

    Raises:
        RequestError: a value is out of range.
    """
    names = ("max_new_tokens", "stop", *(setting.name for setting in fields(Sampling)))
    options: Any = {name: getattr(args, name) for name in names}
    Request.of("", **options)
    return options


def note_if_cut(stream: TextStream, max_new_tokens: int) -> None:
    """Says on stderr that a completion did not come to its own end."""
    if stream.finish_reason == "length":
        count = len(stream.token_ids)
        why = "--max-new-tokens" if count == max_new_tokens else "the context window is full"
        note(f"stopped after {plural(count, 'token')}: {why}")
