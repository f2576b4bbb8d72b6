"""The contents of a report: plain dataclasses of numbers and text, which are also its JSON.

Every KL is in nats per token, and every time is in milliseconds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..measure import Closeness

# The variants that a report compares. The first does not have the prompt's behaviour; the other three do.
NO_PROMPT, PROMPT, CACHED_PREFIX, PATCH = VARIANTS = ("no prompt", "prompt", "prompt, cached prefix", "patch")


# The series of the plot of fidelity against cost. The first four are fitted in the same run; the exact cache is the
# prompt's own keys and values in a file (in four bits with values that are fitted to the rounding, and not exact). A
# shorter prompt costs no bytes in a file but context in every session.
WEIGHTS, ENTRIES, BOTH, EXACT, SHORTER, THIS = SERIES = (
    *("weights", "entries", "entries and weights", "exact cache", "shorter prompt", "this patch"),
)


@dataclass(frozen=True, kw_only=True)
class HeldOut(Closeness):
    """The figures of one model on the held-out queries.

    The names of `Closeness` are for the prompted model's answers, teacher-forced. The others are for the model's own
    free-running answers; they are None if no answer is known.

    Attributes:
        right: the share of the questions with a known answer that the model answers correctly.
        kept: among those that the prompted model answers correctly, the share that this model answers correctly too.
            None also if there are none.
        kept_se: the bootstrap standard error of `kept`; None also for fewer than two such questions.
    """

    right: float | None
    kept: float | None
    kept_se: float | None


@dataclass(frozen=True)
class Variant:
    """One row of the comparison.

    Attributes:
        name: one of VARIANTS.
        held_out: the figures on the held-out queries.
        text_kl: KL(base || this variant) on unrelated plain text.
        question_kl: the same KL on the base's answers to unrelated questions.
        first_token_ms: the median time to the first token under tp_runtime; None if it was not measured.
        token_ms: the median time of each further token under tp_runtime; None if it was not measured.
        session_bytes: the bytes of keys and values that each session holds beyond a session with no prompt.
        shared_bytes: the bytes that are kept once for all sessions: a cached prefix, or the patch file.
    """

    name: str
    held_out: HeldOut
    text_kl: float
    question_kl: float
    first_token_ms: float | None
    token_ms: float | None
    session_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Curve:
    """KL by completion position, in bins of `width` positions; bin i starts at position i * width.

    Attributes:
        width: the number of positions in a bin.
        unpatched: the mean KL of the unpatched model in each bin.
        patched: the mean KL of the patched model in each bin.
        tokens: the number of tokens in each bin.
    """

    width: int
    unpatched: list[float]
    patched: list[float]
    tokens: list[int]


@dataclass(frozen=True)
class Layer:
    """One layer of the patch.

    Attributes:
        layer: the index of the layer.
        retained: site -> share of the map's energy that the stored rank keeps; empty if it is not known.
        kl_without: the KL when only this layer's delta is switched off.
        share: the share of the gap that is then no longer closed: (kl_without - kl) / kl_unpatched.
    """

    layer: int
    retained: dict[str, float]
    kl_without: float
    share: float


@dataclass(frozen=True)
class Strength:
    """The patch at one strength.

    Attributes:
        strength: the factor on the patch.
        kl: the KL from the prompted model.
        distinct: the share of distinct 3-grams in the free-running answers; a low share means that the text loops.
        answer: the free-running answer to the query of the sweep.
    """

    strength: float
    kl: float
    distinct: float
    answer: str


@dataclass(frozen=True)
class Sweep:
    """The patch at several strengths, and the prompted model for comparison.

    Attributes:
        query: the query that every answer is an answer to.
        prompted_answer: the answer of the prompted model.
        prompted_distinct: the share of distinct 3-grams in the prompted model's answers.
        strengths: the figures of each strength.
    """

    query: str
    prompted_answer: str
    prompted_distinct: float
    strengths: list[Strength]


@dataclass(frozen=True)
class Answer:
    """One held-out query and the greedy answers of three variants.

    Attributes:
        query: the query.
        kl: the KL of the patched model on the prompted model's answer.
        no_prompt: the answer without a prompt.
        prompt: the answer with the prompt.
        patch: the answer with the patch.
    """

    query: str
    kl: float
    no_prompt: str
    prompt: str
    patch: str


@dataclass(frozen=True)
class Ending:
    """How the free-running completions of one variant end.

    Attributes:
        name: the variant.
        ended: the share of completions that reach an end-of-sequence token or a stop string.
        silent: the share of completions without text.
        tokens: the mean number of tokens.
    """

    name: str
    ended: float
    silent: float
    tokens: float


@dataclass(frozen=True)
class Long:
    """Completions of up to `limit` tokens.

    Attributes:
        limit: the largest number of tokens of a completion.
        queries: the number of queries.
        forced: the KL along the prompted model's text.
        own: the KL along the patched model's own text, which shows whether it drifts.
        endings: how the completions without a prompt, with the prompt and with the patch end, in this order.
    """

    limit: int
    queries: int
    forced: Curve
    own: Curve
    endings: list[Ending]


@dataclass(frozen=True)
class Turn:
    """One chat turn of the dialogues, along the prompted model's text (`forced`) and the patched model's own (`own`).

    The gap to close shrinks if the history itself shows the behaviour that the prompt asks for.

    Attributes:
        turn: the number of the turn, from 1.
        forced_kl_unpatched: the KL of the unpatched model along the prompted model's text.
        forced: the figures of the patched model along the prompted model's text.
        own_kl_unpatched: the KL of the unpatched model along the patched model's text.
        own: the figures of the patched model along its own text.
        endings: how the answers without a prompt, with the prompt and with the patch end, in this order.
    """

    turn: int
    forced_kl_unpatched: float
    forced: Closeness
    own_kl_unpatched: float
    own: Closeness
    endings: list[Ending]


@dataclass(frozen=True)
class Turns:
    """Dialogues with scripted user messages.

    Attributes:
        dialogues: the number of dialogues.
        limit: the largest number of tokens of an answer.
        turns: the figures of each turn.
        shown: one dialogue in full, as (role, text) of each message, by variant. A system message is the dialogue's
            own; the prompt is not shown.
        why_not: the reason why turns are missing; empty if none is missing.
    """

    dialogues: int
    limit: int
    turns: list[Turn]
    shown: dict[str, list[tuple[str, str]]]
    why_not: str = ""


@dataclass(frozen=True)
class Baseline:
    """One method fitted on the same rows.

    Attributes:
        method: the method.
        setting: the setting that was used, in words.
        closeness: the figures on the held-out queries; None if no setting gives finite tensors.
        bytes: the bytes of its patch file.
        seconds: the duration of the fit.
    """

    method: str
    setting: str
    closeness: Closeness | None
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Fits:
    """The methods that are compared with the patch.

    Attributes:
        queries: the number of queries that the methods were fitted on.
        rows: the number of completion rows that the methods were fitted on.
        exact: whether the refit of the patch's own method has the tensors of the patch file.
        methods: the figures of each method.
        why_not: the reason why nothing was fitted; empty if the methods were fitted.
    """

    queries: int
    rows: int
    exact: bool
    methods: list[Baseline]
    why_not: str = ""


@dataclass(frozen=True)
class Point:
    """One way to have the prompt's effect, with its cost and its figures.

    Attributes:
        series: one of SERIES.
        label: what distinguishes the point in its series, such as "r16", "48" (entries per head) or "2 of 8 lines".
        dtype: the dtype of the tensors in the file, "f16", "i8" or "i4"; "" for a shorter prompt and for the patch of
            the report.
        bytes: the bytes of the patch file; None for a shorter prompt, which needs none.
        context_tokens: the keys and values that each session holds beyond a session with no prompt, in tokens: an
            entry in every layer counts as one.
        held_out: the figures on the held-out queries.
    """

    series: str
    label: str
    dtype: str
    bytes: int | None
    context_tokens: float
    held_out: HeldOut


@dataclass(frozen=True)
class Frontier:
    """The prompt's effect against what it costs, all measured in torch on the same held-out queries.

    Attributes:
        points: the points, series by series.
        missing: the points that could not be made, each with the reason.
    """

    points: list[Point]
    missing: list[str]


@dataclass(frozen=True)
class PatchReport:
    """Every figure measured on one patch.

    `prompt_tokens` is the number of tokens of the prompt's text. `added_tokens` is the number of tokens by which a
    session with the prompt is longer than one without. It is smaller than `prompt_tokens` if the chat template has a
    default system text that the prompt replaces. `entries` has the different numbers of KV entries per head that layers
    have, and is empty for a patch of weights. `systems` has the system messages that queries have of their own, and is
    empty if the prompt stands in place of one. `known_answers` is the number of held-out queries whose answers are
    known.
    """

    name: str
    identity: str
    method: str
    rank: int
    sites: list[str]
    entries: list[int]
    stop: list[str]
    file: str
    file_bytes: int
    created: str | None
    prompt: str
    systems: list[str]
    prompt_tokens: int
    added_tokens: int
    queries: int
    completion_tokens: int
    known_answers: int
    variants: list[Variant]
    positions: Curve
    layers: list[Layer]
    sweep: Sweep | None
    frontier: Frontier | None
    long: Long | None
    turns: Turns
    fits: Fits
    answers: list[Answer]
    worst: list[Answer]

    def variant(self, name: str) -> Variant:
        """Return the row of the comparison with this name."""
        return next(variant for variant in self.variants if variant.name == name)


@dataclass(frozen=True)
class Composed:
    """The sum of the patches, measured on the held-out queries of one of them.

    Attributes:
        name: the name of that patch.
        alone: the figures of that patch only.
        others: the figures of the sum of the other patches.
        together: the figures of the sum of all patches.
        query: the query that both answers are answers to.
        answer_alone: the answer under that patch only.
        answer_together: the answer under the sum of all patches.
    """

    name: str
    alone: Closeness
    others: Closeness
    together: Closeness
    query: str
    answer_alone: str
    answer_together: str


@dataclass(frozen=True)
class Report:
    """The whole report; `runtime` describes the graph that was run and is None if everything ran in torch."""

    base_model: str
    architecture: str
    runtime: str | None
    device: str
    versions: dict[str, str]
    created: str
    command: str
    patches: list[PatchReport]
    composition: list[Composed]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as nested dictionaries for JSON."""
        return asdict(self)
