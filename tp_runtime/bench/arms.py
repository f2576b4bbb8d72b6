"""The variants that a benchmark compares: the base model, a patch, and random patches of a rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import PatchTargetError
from ..model import PatchedModel
from ..patch import Delta, Patch, PatchConfig
from ..session import BoundPatch, Graph, ModelFolder

RANK = 16


@dataclass(frozen=True, eq=False)
class Arm:
    """One of the variants that are compared.

    Attributes:
        label: the name of the arm.
        graph: the graph that runs.
        bound: the bound patch that it runs under.
        prompt: the ids of its prompt.
        patch: the patch that `bound` was made from; None for the base.
    """

    label: str
    graph: Graph
    bound: BoundPatch
    prompt: list[int]
    patch: Patch | None = None


def base_arm(label: str, graph: Graph, length: int, like: Patch | None = None) -> Arm:
    """Return the arm of the base model. If `like` is given, the arm has the same prompt as this patch's arm."""
    return Arm(label, graph, graph.base, _prompt(graph.folder, length, like))


def patch_arm(label: str, model: PatchedModel, patch: Patch, length: int) -> Arm:
    """Return the arm of a patch, after a check that the patch has an effect.

    Raises:
        PatchTargetError: the patch changes no logit, so there is nothing to measure.
        PatchError: the patch does not fit.
    """
    graph = model.graph
    prompt = _prompt(graph.folder, length, patch)
    start = prompt[: len(_lead(patch)) + 1]
    if np.array_equal(model.logits(start, None)[-1], model.logits(start, patch)[-1]):
        raise PatchTargetError(
            "the patch changes nothing, so there is nothing to measure", field="patch", got=patch.name
        )
    return Arm(label, graph, graph.bind(patch), prompt, patch)


def random_patch(folder: ModelFolder, rank: int = RANK, seed: int = 0) -> Patch:
    """Return a random patch in every slot. It is as fast as any patch of its rank; the text under it is noise."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return (0.01 * rng.standard_normal(shape, np.float32)).astype(np.float32)

    deltas = {
        key: Delta(normal(slot.inputs, rank), normal(rank, slot.outputs), normal(slot.outputs))
        for key, slot in folder.slots.items()
    }
    config = PatchConfig(
        name="random",
        method="matrix",
        base_model=folder.base_model,
        base_digest=folder.base_digest,
        architecture=folder.architecture,
        precision=folder.precision,
        context_digest="",
    )
    return Patch(deltas, config)


def _lead(patch: Patch | None) -> list[int]:
    return [] if patch is None or patch.prefix is None else list(patch.prefix.replaces)


def _prompt(folder: ModelFolder, length: int, patch: Patch | None) -> list[int]:
    """Return `length` random ids, after the ids that the patch's KV prefix replaces."""
    return _lead(patch) + np.random.default_rng(0).integers(0, folder.vocab_size, length).tolist()
