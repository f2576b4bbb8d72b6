"""The prompt's effect against what it costs: bytes in a file, or tokens of context in every session.

The points are planned as data first: which patches are to be fitted, with which recipe, and which shorter prompts stand
beside them. Every patch is fitted in the same run on the same queries as the patch of the report, saved in each dtype
that it was fitted for, and measured as it is read back, so the bytes are those on disk and the figures include the
rounding. Entries of four bits are a fit of their own, because the fit knows how coarse they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tp_runtime.errors import CalibrationError, PatchError
from tp_runtime.patch import Patch

from ..fit import ALL, Recipe, Settings, make_patch
from ..measure import Answers, Arm, Prompts, TorchStudent, cached_teacher, diverge, with_prompt, without_prompt
from ..progress import bar
from ..rollout import Dialogue, RolloutStore
from .compare import NOT_FOUND
from .costs import entry_tokens
from .figures import BOTH, ENTRIES, EXACT, SHORTER, THIS, WEIGHTS, Frontier, Point
from .known import Known
from .setup import Setup, Subject
from .shorter import ShorterPromptArm, shorter_prompts

_DTYPES = ("f16", "i8")  # of the files of a fit for the first; entries lose little more in int8
_FOUR_BITS = "i4"  # of the file of a fit for it


@dataclass(frozen=True)
class Planned:
    """One patch to fit for the plot.

    Attributes:
        series: the series of its points.
        label: what distinguishes it in its series.
        recipe: the recipe of its fit.
    """

    series: str
    label: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """What the fit is called where it cannot be made."""
        return ", ".join([self.series, self.label, *(["4 bits"] if self.recipe.dtype == _FOUR_BITS else [])])

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the files that the patch is saved in, a point for each."""
        return (_FOUR_BITS,) if self.recipe.dtype == _FOUR_BITS else _DTYPES


@dataclass(frozen=True)
class _Candidate:
    """One point before it is measured.

    Attributes:
        point: the series, label, dtype, bytes and context tokens of the point.
        arm: the model of the point, for the prompted model's answers.
        answers: the same model's free-running answers.
        prompts: the ids of the known questions as this model sees them; None for the questions without the context.
    """

    point: tuple[str, str, str, int | None, float]
    arm: Arm
    answers: Answers
    prompts: Prompts | None = None


def plan_fits(like: Patch, ranks: Sequence[int], entries: Sequence[int], max_new_tokens: int) -> list[Planned]:
    """Return the patches to fit: weights alone, entries alone, both, and the exact cache.

    Entries alone and the exact cache are fitted once more for a file of four bits.

    Args:
        like: the patch of the report. The fits have its ridge, its stop strings and its number of answers to each
            query, and both has its rank; the form of the weights is `output`.
        ranks: the ranks of weights alone; without any, the rank of `like`.
        entries: the numbers of entries per head.
        max_new_tokens: the length of the answers, if `like` does not state it.
    """
    settings, made = Settings.of(like), like.config.calibration or {}
    weights = Recipe(
        method="output",
        settings=settings,
        stop=like.config.stop,
        samples=int(made.get("samples", 1)),
        max_new_tokens=int(made.get("max_new_tokens", max_new_tokens)),
    )
    alone = replace(weights, method="prefix")
    coarse = replace(alone, dtype=_FOUR_BITS)
    return [
        *(
            Planned(WEIGHTS, f"r{rank}", replace(weights, settings=replace(settings, rank=rank)))
            for rank in ranks or (settings.rank,)
        ),
        *(Planned(ENTRIES, f"{count}", replace(one, prefix=count)) for one in (alone, coarse) for count in entries),
        *(Planned(BOTH, f"{count} + r{settings.rank}", replace(weights, prefix=count)) for count in entries),
        *(Planned(EXACT, "all", replace(one, prefix=ALL)) for one in (alone, coarse)),
    ]


def measure_frontier(
    setup: Setup, subject: Subject, held: Sequence[Dialogue], known: Known, store: RolloutStore
) -> Frontier:
    """Fit the planned patches, and measure them, the patch itself and shorter prompts on the held-out dialogues.

    Args:
        setup: the models, and the ranks and numbers of entries of the plot.
        subject: the patch of the report.
        held: the held-out dialogues.
        known: the held-out questions whose answers are known.
        store: the store of the answers to the calibration queries.
    """
    missing: list[str] = []
    with TemporaryDirectory() as folder:
        candidates = [
            _patch_candidate(setup, subject, THIS, "", "", subject.patch, subject.file.stat().st_size),
            *_fitted(setup, subject, store, Path(folder), missing),
            *_shorter(setup, subject, held, known),
        ]
    arms: Mapping[str, Arm] = {
        "none": without_prompt(TorchStudent(setup.model)),
        **{str(i): candidate.arm for i, candidate in enumerate(candidates)},
    }
    with bar("fidelity against cost", len(held), "query") as shown:
        found = diverge(held, with_prompt(cached_teacher(setup.model, held)), arms, shown.update)
    points = []
    for i, one in enumerate(candidates):
        label = f"known answers, {' '.join(filter(None, one.point[:3]))}"
        figures = known.compare(found["none"], found[str(i)], one.answers, label, one.prompts)
        points.append(Point(*one.point, held_out=figures))
    return Frontier(points, missing)


def _fitted(
    setup: Setup, subject: Subject, store: RolloutStore, folder: Path, missing: list[str]
) -> Iterator[_Candidate]:
    """Yield a candidate for each planned patch and dtype; a patch that cannot be made is added to `missing`."""
    if not subject.fitted:
        missing.append(f"the fits: {NOT_FOUND}")
        return
    for plan in plan_fits(subject.patch, setup.ranks, setup.frontier, setup.max_new_tokens):
        try:
            patch = make_patch(
                *(setup.source, setup.model, subject.context, subject.fitted, [], plan.recipe),
                name=plan.name,
                store=store,
                systems=subject.systems,
            )
        except (CalibrationError, PatchError) as error:  # the model or the context may not allow this form
            missing.append(f"{plan.name}: {error}")
            continue
        for dtype in plan.dtypes:
            file = folder / "point.safetensors"
            patch.save(file, dtype)
            yield _patch_candidate(
                setup, subject, plan.series, plan.label, dtype, Patch.load(file), file.stat().st_size
            )


def _patch_candidate(
    setup: Setup, subject: Subject, series: str, label: str, dtype: str, patch: Patch, size: int
) -> _Candidate:
    tokens = 0.0 if patch.prefix is None else entry_tokens(patch.prefix)
    arm = without_prompt(TorchStudent(setup.model, patch))
    return _Candidate((series, label, dtype, size, tokens), arm, setup.in_torch(subject, patch))


def _shorter(setup: Setup, subject: Subject, held: Sequence[Dialogue], known: Known) -> Iterator[_Candidate]:
    """Yield a candidate for each shorter prompt."""
    own, base = setup.asked(subject), TorchStudent(setup.model)
    for label, context in shorter_prompts(subject.context).items():
        asked = replace(own, context=context)
        prompts = {
            dialogue.student_prompt: tuple(asked.teacher(query))
            for dialogue, query in zip(held, subject.queries, strict=True)
        }
        tokens = len(prompts[held[0].student_prompt]) - len(held[0].student_prompt)
        questions = [asked.teacher(query) for query in known.queries]
        arm = ShorterPromptArm(base, prompts)
        yield _Candidate((SHORTER, label, "", None, tokens), arm, setup.in_torch(subject, None), questions)
