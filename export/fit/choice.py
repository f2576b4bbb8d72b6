"""The choice of a form: the smallest file that reaches a target, or the best that a number of bytes allows.

Entries alone give more for their bytes than weights do, and more of them in four bits more than fewer in eight
(docs/fidelity.md). So the search goes over the number of entries in four bits, and then over nearly all and all of them
in eight: a ladder that is halved at each fit, because a later step is never much worse. Then the step below gets a try
with weights of a low rank beside it. Candidates are fitted on one set of rows and measured on queries of the search's
own. The chosen recipe is then fitted again, on the search's queries too (make.py). The figures that the file states
come from other queries, which neither the choice nor the fit has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tp_runtime.errors import CalibrationError
from tp_runtime.patch import Patch

from .recipe import ALL, Recipe

SizeOf = Callable[[str, int], int]
"""A function that returns the bytes of a file of a dtype with that many entries on average."""
WHOLE = 192  # tokens: a context up to this length keeps all its entries, which is exact and still a small file
_LADDER = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_NEARLY_ALL = 0.75  # of the entries: in int8 they lose less than all of them do in four bits (docs/fidelity.md)
_RANK = 4  # of the weights that are tried beside fewer entries


@dataclass(frozen=True)
class Target:
    """What the chosen file has to be.

    Attributes:
        gap: the share of the prompt's effect to reach, above 0 and at most 1; None for as much as the bytes allow, for
            which nothing has to be searched.
        max_bytes: the largest size of the file; None for any.
        best: whether the best file that was found will do if none reaches the target.
        dtypes: the dtypes to choose from, the one that holds most entries in a byte first.

    Raises:
        CalibrationError: a value is out of its range.
    """

    gap: float | None = None
    max_bytes: int | None = None
    best: bool = False
    dtypes: tuple[str, ...] = ("i4", "i8")

    def __post_init__(self) -> None:
        if self.gap is not None and not 0 < self.gap <= 1:
            raise CalibrationError(
                "the target is not a share", field="--target", got=self.gap, wanted="above 0 and at most 1"
            )
        if self.max_bytes is not None and self.max_bytes < 1:
            raise CalibrationError(
                "the size is not positive", field="--max-bytes", got=self.max_bytes, wanted="at least 1 byte"
            )


@dataclass(frozen=True)
class Trial:
    """A candidate that was fitted.

    Attributes:
        recipe: what it is made of.
        patch: the patch as it would be stored.
        gap: the share of the prompt's effect that it closes on the selection queries.
    """

    recipe: Recipe
    patch: Patch
    gap: float

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self.patch.nbytes


def default_entries(context: int) -> int:
    """Return the number of entries that a context of this many tokens gets if nothing else is asked for."""
    return ALL if context <= WHOLE else max(WHOLE, context // 5)


def choose(recipe: Recipe, target: Target, context: int, size_of: SizeOf, fit: Callable[[Recipe], Trial]) -> Trial:
    """Find the smallest file that reaches a target.

    Args:
        recipe: the recipe whose method, rank, number of entries and dtype are chosen.
        target: the target.
        context: the number of entries that the context has.
        size_of: the bytes of a file.
        fit: a function that fits a recipe and measures it on the selection queries.

    Raises:
        CalibrationError: no file reaches the target, and the best one will not do.
    """
    ladder = _ladder(recipe, target, context, size_of)
    wanted = 1.0 if target.gap is None else target.gap
    found: dict[int, Trial] = {}

    def reaches(place: int) -> bool:
        if place not in found:
            found[place] = fit(ladder[place])
        return found[place].gap >= wanted

    first = _first(len(ladder), reaches)
    best = found[first] if first < len(ladder) else None
    if first > 0:  # the step below, with weights beside it
        smaller = replace(ladder[first - 1], method="output")
        trial = fit(replace(smaller, settings=replace(smaller.settings, rank=_RANK)))
        fits = target.max_bytes is None or trial.size <= target.max_bytes
        if fits and trial.gap >= wanted and (best is None or trial.size < best.size):
            return trial
        if fits:
            found[-1] = trial
    if best is not None:
        return best
    nearest = max(found.values(), key=lambda trial: trial.gap, default=None)
    if nearest is None or not target.best:
        raise _unreachable(target, nearest)
    return nearest


def _ladder(recipe: Recipe, target: Target, context: int, size_of: SizeOf) -> list[Recipe]:
    """Return recipes of entries alone in order of what they close: the first dtype, and then nearly all in the next."""
    counts = [*(step for step in _LADDER if step < context), ALL]
    ladder: list[Recipe] = []
    for dtype in target.dtypes:
        least = _NEARLY_ALL * context if ladder else 0  # fewer would lose more than all in the dtype before
        ladder += [
            replace(recipe, method="prefix", prefix=count, dtype=dtype)
            for count in counts
            if count >= least and (target.max_bytes is None or size_of(dtype, count) <= target.max_bytes)
        ]
    return ladder


def most_entries(recipe: Recipe, context: int, size_of: SizeOf, target: Target) -> Recipe:
    """Return the recipe of the best file of entries that has at most the bytes of a target.

    A later dtype of the target is taken where nearly all entries fit in it, and otherwise the one that holds most.

    Raises:
        CalibrationError: a file of one entry is larger.
    """

    def fitting(dtype: str) -> int:
        most = target.max_bytes
        return context if most is None else _first(context, lambda count: size_of(dtype, count + 1) > most)

    found = {dtype: fitting(dtype) for dtype in target.dtypes}
    if not any(found.values()):
        raise _unreachable(target, None)
    nearly = [dtype for dtype in target.dtypes[1:] if found[dtype] >= _NEARLY_ALL * context]
    dtype = nearly[-1] if nearly else max(target.dtypes, key=lambda dtype: found[dtype])
    prefix = ALL if found[dtype] == context else found[dtype]
    return replace(recipe, method="prefix", prefix=prefix, dtype=dtype)


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """Return the first of 0..count-1 for which a monotone condition holds, by halving; `count` if there is none."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _unreachable(target: Target, nearest: Trial | None) -> CalibrationError:
    within = "" if target.max_bytes is None else f" within {target.max_bytes} bytes"
    wanted = f"a file{within}" if target.gap is None else f"{target.gap:g} of the prompt's effect{within}"
    best = "nothing that small" if nearest is None else f"{nearest.gap:.3f} in {nearest.size} bytes"
    return CalibrationError(
        "no file reaches the target",
        field="--target" if target.gap is not None else "--max-bytes",
        got=f"{best}, on the selection queries",
        wanted=wanted,
        fix="pass --best to write the best file found, a lower --target or a larger --max-bytes",
    )


def selection_size(fitted: Sequence[str]) -> int:
    """Return how many calibration queries the search keeps to measure its candidates on.

    Raises:
        CalibrationError: there are too few queries to fit and to select on.
    """
    if len(fitted) < 16:
        raise CalibrationError(
            "there are too few queries to fit and to select on",
            field="--target",
            got=f"{len(fitted)} calibration queries",
            wanted="at least 16",
            fix="pass more queries, or --prefix N instead of --target",
        )
    return max(8, len(fitted) // 5)
