"""How close a student comes to its teacher: KL(teacher || student) per completion token, teacher-forced.

gap_closed = 1 - KL(patched) / KL(unpatched): 0 is no patch, 1 is the prompt itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tp_runtime.errors import CalibrationError
from tp_runtime.patch import Patch
from tp_runtime.session import Graph

from ..decoder import patched, torch_prefix
from ..quantise import QuantisedStudent, as_student
from ..rollout import Dialogue

# (token ids, first) -> logits [len(token ids) - first, vocab] of the positions from `first` on.
Student = Callable[[Sequence[int], int], Tensor]


@dataclass(frozen=True)
class Fidelity:
    """Figures over the completion tokens of all queries; KL in nats per token."""

    kl_unpatched: float
    kl_patched: float
    gap_closed: float
    top1_agreement: float
    top1_agreement_unpatched: float
    completion_tokens: int
    queries: int

    def to_dict(self) -> dict[str, float]:
        """For JSON and for the patch file."""
        return {key: round(value, 6) for key, value in asdict(self).items()}


def torch_student(model: Any, patch: Patch | None = None, student: QuantisedStudent | None = None) -> Student:
    """A student run by transformers, patched by forward hooks, with the patch's KV prefix in front.

    `student` has the weights it runs with, where they are not the model's own.
    """
    prefix = None if patch is None else torch_prefix(patch, model)
    replaced = 0 if prefix is None else len(prefix.replaces)

    def run(tokens: Sequence[int], first: int) -> Tensor:
        if patch is not None and patch.prefix is not None:
            patch.prefix.require_start(tokens)
        ids = torch.tensor([list(tokens[replaced:])], device=model.device)
        inputs = {"use_cache": False} if prefix is None else prefix.model_inputs(torch.ones_like(ids))
        with torch.no_grad(), as_student(student), nullcontext() if patch is None else patched(model, patch):
            return model(ids, **inputs, logits_to_keep=len(tokens) - first).logits[0]

    return run


def runtime_student(graph: Graph, patch: Patch | None = None) -> Student:
    """A student run by tp_runtime: the exported graph, its precision and its slots are inside the figure."""
    bound = graph.bind(patch)

    def run(tokens: Sequence[int], first: int) -> Tensor:
        cache = graph.new_cache(bound)
        cache.require_start(tokens)
        if first > len(cache):
            graph.forward(tokens[len(cache) : first], cache, bound)
        return torch.from_numpy(graph.forward(tokens[first:], cache, bound, all_logits=True))

    return run


def measure_fidelity(
    dialogues: Sequence[Dialogue],
    teacher: Student,
    unpatched: Student,
    patched: Student,
    progress: Callable[[], None] = lambda: None,
) -> Fidelity:
    """Compare the three over the completion tokens of `dialogues`.

    Raises:
        CalibrationError: no dialogues, no completion tokens, or a context without effect (nothing to close).
    """
    divergence = torch.zeros(2, dtype=torch.float64)
    agreement = torch.zeros(2, dtype=torch.float64)
    tokens = 0
    for dialogue in dialogues:
        if not dialogue.completion:
            continue
        wanted = teacher(dialogue.teacher(), len(dialogue.teacher_prompt) - 1).float().log_softmax(-1)
        for side, student in enumerate((unpatched, patched)):
            got = (
                student(dialogue.student(), len(dialogue.student_prompt) - 1).float().log_softmax(-1).to(wanted.device)
            )
            divergence[side] += (wanted.exp() * (wanted - got)).sum().double().cpu()
            agreement[side] += (wanted.argmax(-1) == got.argmax(-1)).sum().cpu()
        tokens += len(dialogue.completion)
        progress()
    if not tokens:
        raise CalibrationError(
            "the held-out queries gave no completion tokens",
            field="queries",
            got=f"{len(dialogues)} queries",
            wanted="at least one with a completion",
            fix="use other queries, or check that the model answers at all",
        )
    kl, same = divergence / tokens, agreement / tokens
    if kl[0] < 1e-7:
        raise CalibrationError(
            "the prompt has no effect on these queries",
            field="prompt",
            got=f"KL {float(kl[0]):.2g} without a patch",
            wanted="a difference to close",
            fix="use a prompt that changes the answers, or other queries",
        )
    return Fidelity(
        kl_unpatched=float(kl[0]),
        kl_patched=float(kl[1]),
        gap_closed=float(1 - kl[1] / kl[0]),
        top1_agreement=float(same[1]),
        top1_agreement_unpatched=float(same[0]),
        completion_tokens=tokens,
        queries=len(dialogues),
    )
