"""This module checks that a patch is live on this device and that it computes what it computed on the host.

At export the host runs the patched model on a few token ids and writes the result into the patch file. `check_probe`
runs the same ids on this device, with the patch and without it, so that a patch that is silently ignored cannot pass.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PatchFormatError
from ..patch import Patch
from .graph import Graph

# The largest logit error that counts as rounding. Float32 kernels differ by about 1e-4. Kernels in fp16, whose
# significand has 11 bits, differ by about 1e-2.
_TOLERANCE = {"fp32": 5e-3, "fp16": 0.25}


@dataclass(frozen=True)
class ProbeCheck:
    """The result of `check_probe`.

    Attributes:
        live: whether the patch changes the logits on this device.
        ok: whether the patch is live and computes what it computed on the host.
        top1_agreement: the share of the probe's positions with the same most likely token as on the host.
        max_logit_error: the largest difference from the host, over the logits of the host's most likely tokens and the
            logsumexp of every position.
        max_logit_error_unpatched: the same difference with no patch bound, for comparison.
    """

    live: bool
    ok: bool
    top1_agreement: float
    max_logit_error: float
    max_logit_error_unpatched: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary for JSON."""
        return asdict(self)


def measure_probe(token_ids: list[int], logits: NDArray[np.float32]) -> dict[str, list[Any]]:
    """Return the probe that a patch file stores.

    Args:
        token_ids: the ids that were run.
        logits: the logits [n, vocab] of the last n ids, under the patch.

    Returns:
        The ids, and for each of the n positions the most likely token, its logit, and the logsumexp of the logits.
    """
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

    On a quantised graph the logits differ from the host's by more than rounding. There the patch passes if its logits
    are closer to the host's than the base's logits are.

    Raises:
        PatchFormatError: the patch has no probe, or its probe does not belong to this model or to this patch.
        PatchError: the patch does not fit the graph.
    """
    probe = patch.config.probe
    if probe is None:
        raise PatchFormatError(
            f"the patch {patch.name!r} has no probe",
            field="config.probe",
            got="nothing",
            wanted="token ids and their logits",
            fix="check the patch as it was exported: scaled, added and truncated patches have no values from the host",
        )
    token_ids, vocabulary = probe["token_ids"], graph.folder.vocab_size
    if max(*token_ids, *probe["top1"]) >= vocabulary or len(token_ids) > graph.folder.context_window:
        raise PatchFormatError(
            f"the probe of the patch {patch.name!r} was made for another model",
            field="config.probe",
            got=f"{len(token_ids)} ids up to {max(*token_ids, *probe['top1'])}",
            wanted=f"at most {graph.folder.context_window} ids below {vocabulary}",
            fix="export the patch again",
        )
    if patch.prefix is not None and tuple(token_ids[: len(patch.prefix.replaces)]) != patch.prefix.replaces:
        raise _other_probe(patch, "ids that do not start with those that the KV prefix replaces")
    replaced = 0 if patch.prefix is None else len(patch.prefix.replaces)
    if len(probe["top1"]) != len(token_ids) - replaced:
        raise _other_probe(patch, f"{len(probe['top1'])} positions for {len(token_ids) - replaced} ids")
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
        f"the probe of the patch {patch.name!r} was made for another patch",
        field="config.probe",
        got=got,
        wanted="the ids that a prompt starts with under this patch, and a position for each id that is run",
        fix="export the patch again",
    )
