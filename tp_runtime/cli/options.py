"""The options that several commands share: the device, patches with strengths, and sampling."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from ..errors import PatchTargetError, PatchValueError, RequestError, library_text, shown
from ..generation import Sampling
from ..model import ACTIVE, PatchChoice, PatchedModel, TextStream
from ..patch import Patch
from ..session import DEVICES, ModelFolder, SessionOptions
from ..storage import MAX_JSON_BYTES, UnreadableFileError, read_regular
from ..text import Request, SamplingOptions
from .printing import note, plural

NONE = "none"  # in place of a file it selects the base model, even if the folder has a default patch


@dataclass(frozen=True)
class Part:
    """One patch of a sum.

    Attributes:
        name: the name of the patch; None if it is not known.
        identity: the identity of the patch; see `Patch.identity`.
        strength: the factor on the patch.
    """

    name: str | None
    identity: str
    strength: float

    def __str__(self) -> str:
        return f"{self.name or self.identity[:12]}@{self.strength:g}"


@dataclass(frozen=True)
class Selection:
    """The patch that the command line selects, and the patches that it is the sum of.

    Attributes:
        choice: the value for PatchedModel: a patch, None for the base, or ACTIVE for the patch that the folder was
            exported with.
        parts: the patches whose sum `choice` is; empty if `choice` is None or ACTIVE.
    """

    choice: PatchChoice
    parts: tuple[Part, ...] = ()

    def applied(self, folder: ModelFolder, strength: float = 1.0) -> tuple[Part, ...]:
        """Return the selected patches with their strengths, or those of the folder's default patch.

        A repair that is part of the base is not listed.
        """
        default = folder.default_patch
        if self.choice is ACTIVE and default is not None and not default.repair:
            name = default.name if len(default.terms) == 1 else None  # the name of a sum does not name its parts
            return tuple(Part(name, identity, factor * strength) for identity, factor in default.terms)
        return tuple(Part(part.name, part.identity, part.strength * strength) for part in self.parts)

    def describe(self, folder: ModelFolder, strength: float = 1.0) -> str:
        """Return the result of `applied` as one line."""
        return " + ".join(map(str, self.applied(folder, strength))) or "no patch"


BASE = Selection(None)


# -- the model -------------------------------------------------------------------------------------------------


def add_model_options(parser: argparse.ArgumentParser, *, capturable: bool = True) -> None:
    """Add MODEL and the options of `session_options` to a parser.

    Args:
        parser: the parser.
        capturable: whether the command decodes single sequences. CUDA does not capture the steps of batches.
    """
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model folder written by tp-export")
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="auto (default) takes CUDA if it is available, and otherwise the CPU, with a warning if this machine is "
        "set up for CUDA",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="the number of threads of one operator (default: one for each core)"
    )
    parser.add_argument(
        "--window-cache",
        action="store_true",
        help="let layers with a sliding window drop the keys and values outside it, which takes less memory on long "
        "texts; going back far in a text then computes it again",
    )
    if capturable:
        parser.add_argument(
            "--cuda-graphs",
            action="store_true",
            help="on CUDA, capture the decode steps and replay them; the model must compute in float16",
        )
    else:
        parser.set_defaults(cuda_graphs=False)


def session_options(args: argparse.Namespace) -> SessionOptions:
    """Return the settings of a session that the command line states."""
    return {"threads": args.threads, "window_cache": args.window_cache, "cuda_graphs": args.cuda_graphs}


def open_model(args: argparse.Namespace) -> PatchedModel:
    """Open the model that the command line names.

    Raises:
        RequestError: the number of threads is not positive, or is too large.
        ModelError: see PatchedModel.from_pretrained.
    """
    return PatchedModel.from_pretrained(args.model, args.device, **session_options(args))


def read_text(path: Path, field: str, most: int = MAX_JSON_BYTES) -> str:
    """Return the text of a file.

    Args:
        path: the file.
        field: the option or the file, for errors.
        most: the largest number of bytes.

    Raises:
        RequestError: it is no regular file of at most that size, or is not UTF-8.
        OSError: the file cannot be opened.
    """
    try:
        return read_regular(path, most).decode("utf-8")
    except UnreadableFileError as error:
        raise RequestError(error.problem, field=field, got=error.got, wanted=error.wanted) from error
    except UnicodeDecodeError as error:
        raise RequestError("the file is not text", field=field, got=library_text(error), wanted="UTF-8 text") from error


# -- patches ---------------------------------------------------------------------------------------------------


def add_patch_option(parser: argparse.ArgumentParser) -> None:
    """Add --patch to a parser; the option may be repeated."""
    parser.add_argument(
        "--patch",
        action="append",
        default=[],
        metavar="FILE[@STRENGTH]",
        help="run under this patch, scaled by STRENGTH (default 1; a negative one inverts the effect); if the option "
        f"is repeated, the patches are added; '{NONE}' selects the base model (default: the patch that the folder was "
        "exported with)",
    )


def read_patches(specs: Sequence[str]) -> Selection:
    """Read patch files and add the patches: s1*p1 + s2*p2.

    Args:
        specs: strings of the form FILE or FILE@STRENGTH, or only the string `none`. An empty sequence selects the patch
            that the folder was exported with.

    Raises:
        PatchError: a file is not a patch, a strength is not a number, or the patches cannot be added.
    """
    if not specs:
        return Selection(ACTIVE)
    if list(specs) == [NONE]:
        return BASE
    if NONE in specs:
        raise PatchTargetError(
            f"{NONE!r} selects the base model and cannot be added to a patch",
            field="patch",
            got=" ".join(specs),
            fix=f"leave it out, or write ./{NONE} if a file has this name",
        )
    terms, parts = [], []
    for file, strength in map(split_spec, specs):
        patch = Patch.load(file)
        terms.append(strength * patch)
        parts.append(Part(patch.name, patch.identity, float(strength)))
    return Selection(reduce(add, terms), tuple(parts))


def split_spec(spec: str) -> tuple[str, float]:
    """Split FILE[@STRENGTH] into the file and the strength. The name of an existing file may contain an @.

    Raises:
        PatchValueError: the file exists, and the text after its @ is not a number.
    """
    file, at, factor = spec.rpartition("@")
    if not at or os.path.exists(spec):
        return spec, 1.0
    try:
        return file, float(factor)
    except ValueError:
        if not os.path.exists(file):
            return spec, 1.0  # a file name with an @ that does not exist: the reader reports it
        raise not_a_strength(factor) from None


def parse_strength(text: str) -> float:
    """Parse a strength. The patch itself refuses NaN and values that float32 cannot represent.

    Raises:
        PatchValueError: the text is not a number.
    """
    try:
        return float(text)
    except ValueError:
        raise not_a_strength(text) from None


def not_a_strength(text: str) -> PatchValueError:
    """Return the error for text that should have been a strength."""
    return PatchValueError(
        "the value is not a valid strength", field="strength", got=repr(text), wanted="a number, such as 0.5 or -1"
    )


# -- sampling --------------------------------------------------------------------------------------------------

# The option's field in Sampling or Request, its type, its metavar, and its help without the default.
_SETTINGS: tuple[tuple[str, type, str, str], ...] = (
    ("temperature", float, "T", "divide the logits by T; 0 takes the most likely token"),
    ("top_k", int, "K", "draw from the K most likely tokens; 0 means all"),
    ("top_p", float, "P", "draw from the most likely tokens whose probabilities sum to P; 1 means all"),
    ("min_p", float, "P", "drop tokens with less than P times the probability of the most likely one"),
    ("repetition_penalty", float, "R", "a value above 1 reduces repetition"),
    ("frequency_penalty", float, "F", "subtract F from a token's logit for each time that the completion has it"),
    ("presence_penalty", float, "F", "subtract F from the logit of every token that the completion has"),
    ("min_new_tokens", int, "N", "pick no end-of-sequence token before N tokens"),
)


def add_sampling_options(parser: argparse.ArgumentParser, sampling: str = "greedy") -> None:
    """Add the options for choosing tokens and for ending a completion to a parser.

    Args:
        parser: the parser.
        sampling: "greedy" or "model", the default of --sampling.
    """
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=Request.max_new_tokens,
        metavar="N",
        help="generate at most N tokens (default %(default)s)",
    )
    group.add_argument(
        "--sampling",
        choices=("greedy", "model"),
        default=sampling,
        help="what decides where the options below do not: greedy choice, or the model's own settings (its "
        "generation_config.json); default %(default)s",
    )
    for name, kind, metavar, text in _SETTINGS:
        text = f"{text} (default {getattr(Sampling, name):g})"
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--logit-bias",
        action="append",
        metavar="ID=BIAS",
        help="add BIAS, from -100 to 100, to the logit of this token id; may be repeated",
    )
    group.add_argument("--seed", type=int, metavar="N", help="make the random draws repeatable")
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end the completion before TEXT; may be repeated (default: the stop strings of the patch, if it has any)",
    )
    group.add_argument(
        "--no-stop",
        action="store_const",
        const=[],
        dest="stop",
        help="end the completion at no stop string, also if the patch has some",
    )


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """Return the keyword arguments for PatchedModel.stream: what the command line states, and nothing else.

    They are checked here, before opening the model takes seconds.

    Raises:
        RequestError: a value is not valid.
    """
    names = ("max_new_tokens", "stop", "seed", *(name for name, *_ in _SETTINGS))
    options: Any = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.logit_bias is not None:
        options["logit_bias"] = dict(map(_bias, args.logit_bias))
    if args.sampling == "model":
        options["sampling"] = "model"
    Request.of("", **options)
    return options


def _bias(spec: str) -> tuple[str, float]:
    """Split ID=BIAS. `Sampling` checks both."""
    token, equals, bias = spec.partition("=")
    try:
        return token, float(bias if equals else "")
    except ValueError:
        raise RequestError(
            "the value is not ID=BIAS", field="logit_bias", got=shown(spec), wanted="such as 42=-100"
        ) from None


def note_if_cut(stream: TextStream, max_new_tokens: int) -> None:
    """Report on stderr that a completion was cut: it reached its largest number of tokens or the context window."""
    if stream.finish_reason == "length":
        count = len(stream.token_ids)
        reason = "--max-new-tokens" if count == max_new_tokens else "the context window is full"
        note(f"stopped after {plural(count, 'token')}: {reason}")
