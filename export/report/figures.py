"""What a report holds: plain dataclasses of numbers and text, also its JSON. KL in nats per token, times in ms."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One row of the comparison: a variant to get the prompt's behaviour.

    Attributes:
        name: no prompt, prompt, prompt with cached prefix, patch.
        kl, gap_closed, top1: against the prompted model, on the held-out queries.
        text_kl: KL(base || this variant) on unrelated plain text.
        question_kl: the same on the base's answers to unrelated questions.
        first_token_ms, token_ms: medians under tp_runtime; None without it.
        session_bytes: of KV that each session carries beyond one with no prompt.
        shared_bytes: kept once for all sessions: a cached prefix, or the patch file.
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
    """KL by completion position, in bins of `width` positions; bin i starts at position i * width."""

    width: int
    unpatched: list[float]
    patched: list[float]
    tokens: list[int]


@dataclass(frozen=True)
class Layer:
    """One layer of the patch.

    Attributes:
        retained: site -> share of the map's energy that the stored rank keeps; empty where it is not known.
        kl_without: with this layer's delta alone switched off.
        share: of the gap, what is no longer closed then: (kl_without - kl) / kl_unpatched.
    """

    layer: int
    retained: dict[str, float]
    kl_without: float
    share: float


@dataclass(frozen=True)
class Strength:
    """The patch scaled. `distinct`: distinct share of the 3-grams of its free-running answers; low is a loop."""

    strength: float
    kl: float
    distinct: float
    answer: str


@dataclass(frozen=True)
class Sweep:
    """The strengths, the query that `answer`s are to, and the prompted model beside them."""

    query: str
    prompted_answer: str
    prompted_distinct: float
    strengths: list[Strength]


@dataclass(frozen=True)
class Answer:
    """One held-out query answered three variants, greedily; `kl` of the patch on the prompted answer."""

    query: str
    kl: float
    no_prompt: str
    prompt: str
    patch: str


@dataclass(frozen=True)
class Ending:
    """How free-running completions of one variant end: share with an end of turn, share empty, mean tokens."""

    name: str
    ended: float
    silent: float
    tokens: float


@dataclass(frozen=True)
class Long:
    """Completions of up to `limit` tokens.

    Attributes:
        forced: on the prompted model's text.
        own: on the patched model's own text, which is where it goes if it drifts.
        endings: of no prompt, prompt and patch.
    """

    limit: int
    queries: int
    forced: Curve
    own: Curve
    endings: list[Ending]


@dataclass(frozen=True)
class Turn:
    """One turn of the dialogues, on the prompted model's text (`forced`) and on the patched model's own.

    The gap that there is to close shrinks where the history itself shows what the prompt asks for.
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
    """Dialogues of scripted user turns; `why_not` where there are none, `shown` one of them in full."""

    dialogues: int
    limit: int
    turns: list[Turn]
    shown: dict[str, list[tuple[str, str]]]
    why_not: str = ""


@dataclass(frozen=True)
class Baseline:
    """One method fitted on the same rows; bytes in half precision. No KL where it did not stay finite."""

    method: str
    setting: str
    kl: float | None
    gap_closed: float | None
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Fits:
    """Methods beside each other. `exact`: the refit has the file's tensors; `why_not` where nothing was fitted."""

    queries: int
    rows: int
    exact: bool
    methods: list[Baseline]
    why_not: str = ""


@dataclass(frozen=True)
class Point:
    """One mixture of KV entries and weights: entries a head, bytes of its file's tensors, and what it reaches."""

    entries: int
    bytes: int
    weights: bool
    gap_closed: float


@dataclass(frozen=True)
class PatchReport:
    """Everything measured of one patch.

    `prompt_tokens` are those of its text; a session carries `added_tokens` of them more than one without a prompt,
    fewer where the chat template has a default system text that the prompt replaces.
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
        """A row of the comparison by its name."""
        return next(variant for variant in self.variants if variant.name == name)


@dataclass(frozen=True)
class Composed:
    """The sum of the patches on one patch's own held-out queries: gap closed by it alone, by the others, by the sum."""

    name: str
    alone: float
    others: float
    together: float
    query: str
    answer_alone: str
    answer_together: str


@dataclass(frozen=True)
class Report:
    """The whole report. `runtime` describes the graph that was run, None if everything ran in torch."""

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
        """For JSON."""
        return asdict(self)


def summary(report: PatchReport) -> dict[str, float]:
    """The few numbers that go into the patch's own description, name -> number."""
    patch, prompt = report.variant("patch"), report.variant("prompt")
    figures: dict[str, float | None] = {
        "gap_closed": patch.gap_closed,
        "kl": patch.kl,
        "kl_no_prompt": report.variant("no prompt").kl,
        "queries": report.queries,
        "unrelated_text_kl": patch.text_kl,
        "unrelated_text_kl_prompt": prompt.text_kl,
        "session_bytes_saved": prompt.session_bytes - patch.session_bytes,
        "first_token_ms": patch.first_token_ms,
        "token_ms": patch.token_ms,
    }
    if report.long is not None:
        ended = {ending.name: ending.ended for ending in report.long.endings}
        figures |= {"ends_turn": ended["patch"], "ends_turn_prompt": ended["prompt"]}
    figures |= {f"gap_closed_turn_{turn.turn}": turn.own_gap for turn in report.turns.turns}
    return {name: round(value, 6) for name, value in figures.items() if value is not None}
