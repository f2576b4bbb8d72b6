"""Is a patch live on this device, and does it do what it did on the host?

At export the patched model is run on a few token ids and the result goes into the patch file. `check` runs the same
ids here, with the patch and without, so that a patch that is silently ignored cannot pass.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PatchFormatError
from ..patch import Patch
from .graph import Graph

# Largest logit error that is rounding: float32 kernels differ by some 1e-4, halves of 11 bits by some 1e-2.
_TOLERANCE = {"fp32": 5e-3, "fp16": 0.25}


@dataclass(frozen=True)
class ProbeCheck:
    """What `check` found.

    Attributes:
        live: the patch changes the logits on this device.
        ok: it is live and does what it did on the host.
        top1_agreement: share of the probe's positions with the same most likely token as on the host.
        max_logit_error: of those tokens' logits, against the host's.
        max_logit_error_unpatched: the same with no patch bound, for comparison.
    """

    live: bool
    ok: bool
    top1_agreement: float
    max_logit_error: float
    max_logit_error_unpatched: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure_probe(token_ids: list[int], logits: NDArray[np.float32]) -> dict[str, list[Any]]:
    """The probe of a patch file: logits [n, vocab] of the last n of `token_ids` under the patch, in a few numbers."""
    top1 = logits.argmax(1)
    peak = logits.max(1, keepdims=True).astype(np.float64)
    logsumexp = peak[:, 0] + np.log(np.exp(logits - peak).sum(1))
    return {
        "token_ids": [int(t) for t in token_ids],
        "top1": [int(t) for t in top1],
        "top1_logits": [round(float(x), 5) for x in logits[np.arange(len(top1)), top1]],
        "logsumexp": [round(float(x), 5) for x in logsumexp],
    }


def check_probe(graph: Graph, patch: Patch) -> ProbeCheck:
    """Run the patch's probe on `graph`.

    On a quantised graph the logits move by more than rounding; there the patch passes if it brings them closer to the
    host's than the base is.

    Raises:
        PatchFormatError: the patch carries no probe, or one with ids this model does not have.
        PatchError: it does not fit the graph.
    """
    probe = patch.config.probe
    if probe is None:
        raise PatchFormatError(
            f"the patch {patch.name!r} carries no probe",
            field="config.probe",
            got="nothing",
            wanted="token ids and their logits",
            fix="check a patch as exported: scaled, added and truncated ones have no host figures",
        )
    token_ids, vocabulary = probe["token_ids"], graph.folder.vocab_size
    if max(*token_ids, *probe["top1"]) >= vocabulary or len(token_ids) > graph.folder.context_window:
        raise PatchFormatError(
            f"the probe of the patch {patch.name!r} is of another model",
            field="config.probe",
            got=f"{len(token_ids)} ids up to {max(*token_ids, *probe['top1'])}",
            wanted=f"at most {graph.folder.context_window} ids below {vocabulary}",
            fix="export the patch again",
        )
    if patch.prefix is not None and tuple(token_ids[: len(patch.prefix.replaces)]) != patch.prefix.replaces:
        raise _other_probe(patch, "ids that do not start with those that the KV prefix replaces")
    replaced = 0 if patch.prefix is None else len(patch.prefix.replaces)
    if len(probe["top1"]) != len(token_ids) - replaced:
        raise _other_probe(patch, f"{len(probe['top1'])} positions of {len(token_ids) - replaced}")
    host = np.array(probe["top1_logits"], np.float64), np.array(probe["logsumexp"], np.float64)

    def run(chosen: Patch | None) -> tuple[NDArray[np.float32], float]:
        logits = graph.run(token_ids, graph.bind(chosen))[-len(probe["top1"]) :]
        here = measure_probe(token_ids, logits)
        at_host_top1 = logits[np.arange(len(logits)), probe["top1"]]
        return logits, float(max(np.abs(at_host_top1 - host[0]).max(), np.abs(here["logsumexp"] - host[1]).max()))

    patched, error = run(patch)
    base, error_base = run(None)
    agreement = float((patched.argmax(1) == np.array(probe["top1"])).mean())
    live = not np.array_equal(patched, base)
    tolerance = _TOLERANCE.get(graph.folder.precision)
    as_on_host = error < error_base if tolerance is None else error <= tolerance
    return ProbeCheck(live, live and as_on_host, agreement, error, error_base)


def _other_probe(patch: Patch, got: str) -> PatchFormatError:
    return PatchFormatError(
        f"the probe of the patch {patch.name!r} is of another patch",
        field="config.probe",
        got=got,
        wanted="the ids a prompt starts with under this patch, and a position for each that is run",
        fix="export the patch again",
    )
