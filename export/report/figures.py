"""The contents of a report: plain dataclasses of numbers and text, which are also its JSON.

Every KL is in nats per token, and every time is in milliseconds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# The variants that a report compares. The first does not have the prompt's behaviour; the other three do.
NO_PROMPT, PROMPT, CACHED_PREFIX, PATCH = VARIANTS = ("no prompt", "prompt", "prompt, cached prefix", "patch")


@dataclass(frozen=True)
class Variant:
    """One row of the comparison.

    Attributes:
        name: one of VARIANTS.
        kl: the KL from the prompted model on the held-out queries.
        gap_closed: the gap closed on the held-out queries.
        top1: the share of tokens at which the argmax equals that of the prompted model.
        text_kl: KL(base || this variant) on unrelated plain text.
        question_kl: the same KL on the base's answers to unrelated questions.
        first_token_ms: the median time to the first token under tp_runtime; None if it was not measured.
        token_ms: the median time of each further token under tp_runtime; None if it was not measured.
        session_bytes: the bytes of keys and values that each session holds beyond a session with no prompt.
        shared_bytes: the bytes that are kept once for all sessions: a cached prefix, or the patch file.
    """

    name: str
    kl: float
    gap_closed: float
    top1: float
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
        ended: the share of completions that reach an end-of-sequence token.
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
        forced_kl: the KL of the patched model along the prompted model's text.
        forced_gap: the gap closed along the prompted model's text.
        own_kl_unpatched: the KL of the unpatched model along the patched model's text.
        own_kl: the KL of the patched model along its own text.
        own_gap: the gap closed along the patched model's text.
        endings: how the answers without a prompt, with the prompt and with the patch end, in this order.
    """

    turn: int
    forced_kl_unpatched: float
    forced_kl: float
    forced_gap: float
    own_kl_unpatched: float
    own_kl: float
    own_gap: float
    endings: list[Ending]


@dataclass(frozen=True)
class Turns:
    """Dialogues with scripted user messages.

    Attributes:
        dialogues: the number of dialogues.
        limit: the largest number of tokens of an answer.
        turns: the figures of each turn.
        shown: one dialogue in full, as (role, text) of each message, by variant.
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
        kl: the KL on the held-out queries; None if no setting gives finite tensors.
        gap_closed: the gap closed on the held-out queries; None if no setting gives finite tensors.
        bytes: the bytes of its patch file.
        seconds: the duration of the fit.
    """

    method: str
    setting: str
    kl: float | None
    gap_closed: float | None
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
    """One mixture of KV entries and weights.

    Attributes:
        entries: the number of KV entries per head.
        bytes: the bytes of the mixture's patch file.
        weights: whether the mixture has fitted weights.
        gap_closed: the gap closed on the held-out queries.
    """

    entries: int
    bytes: int
    weights: bool
    gap_closed: float


@dataclass(frozen=True)
class PatchReport:
    """Every figure measured on one patch.

    `prompt_tokens` is the number of tokens of the prompt's text. `added_tokens` is the number of tokens by which a
    session with the prompt is longer than one without. It is smaller than `prompt_tokens` if the chat template has a
    default system text that the prompt replaces.
    """

    name: str
    identity: str
    method: str
    rank: int
    sites: list[str]
    file: str
    file_bytes: int
    created: str | None
    prompt: str
    prompt_tokens: int
    added_tokens: int
    queries: int
    completion_tokens: int
    variants: list[Variant]
    positions: Curve
    layers: list[Layer]
    sweep: Sweep | None
    frontier: list[Point]
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
        alone: the gap closed by that patch only.
        others: the gap closed by the sum of the other patches.
        together: the gap closed by the sum of all patches.
        query: the query that both answers are answers to.
        answer_alone: the answer under that patch only.
        answer_together: the answer under the sum of all patches.
    """

    name: str
    alone: float
    others: float
    together: float
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


def summary(report: PatchReport) -> dict[str, float]:
    """Return the few numbers, by name, that are stored in the description of the patch file."""
    patch, prompt = report.variant(PATCH), report.variant(PROMPT)
    figures: dict[str, float | None] = {
        "gap_closed": patch.gap_closed,
        "kl": patch.kl,
        "kl_no_prompt": report.variant(NO_PROMPT).kl,
        "queries": report.queries,
        "unrelated_text_kl": patch.text_kl,
        "unrelated_text_kl_prompt": prompt.text_kl,
        "session_bytes_saved": prompt.session_bytes - patch.session_bytes,
        "first_token_ms": patch.first_token_ms,
        "token_ms": patch.token_ms,
    }
    if report.long is not None:
        ended = {ending.name: ending.ended for ending in report.long.endings}
        figures |= {"ends_turn": ended[PATCH], "ends_turn_prompt": ended[PROMPT]}
    figures |= {f"gap_closed_turn_{turn.turn}": turn.own_gap for turn in report.turns.turns}
    return {name: round(value, 6) for name, value in figures.items() if value is not None}
