"""This module makes random patches for tests: small, valid, and equal for equal seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tp_runtime.patch import KV_PARTS, Delta, KVPrefix, Patch, PatchConfig, fitted_precision
from tp_runtime.session import ModelFolder

DIGEST = "0123456789abcdef" * 4


def random_config(**changes: Any) -> PatchConfig:
    """Return a complete patch config; keyword arguments replace its values."""
    values: dict[str, Any] = {
        "name": "pirate",
        "method": "output",
        "base_model": "tests/tiny-llama",
        "base_digest": DIGEST,
        "architecture": "LlamaForCausalLM",
        "precision": "fp32",
        "context_digest": "ab" * 32,
        "ridge": 1.0,
        "calibration": {"queries": 44, "rows": 1200, "max_new_tokens": 40, "holdout": 16},
        "fidelity": {"kl_unpatched": 0.657, "kl": 0.03, "top1": 0.9},
        "licence": "Apache-2.0",
        "created": "2025-01-31T12:00:00+00:00",
        "probe": {"token_ids": [1, 5], "top1": [7, 9], "top1_logits": [3.5, 4.0], "logsumexp": [5.0, 6.0]},
    }
    return PatchConfig(**{**values, **changes})


def random_patch(
    seed: int = 0,
    layers: int = 2,
    ranks: int | Sequence[int] = 4,
    sites: Sequence[str] = ("mlp_out",),
    inputs: int = 12,
    outputs: int = 8,
    scale: float = 1.0,
    config: PatchConfig | None = None,
) -> Patch:
    """Return a patch with every part in every slot.

    Args:
        seed: equal seeds give equal patches.
        layers: the number of patched layers, from layer 0.
        ranks: one rank for all layers, or one per layer; a delta of rank 0 has only a bias.
        sites: the sites that are patched in every layer.
        inputs: the size of [in] in every slot.
        outputs: the size of [out] in every slot.
        scale: the standard deviation of a @ b and of the bias.
        config: the config of the patch; the default is `random_config()`.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    deltas = {}
    for layer in range(layers):
        rank = ranks if isinstance(ranks, int) else ranks[layer]
        for site in sites:
            bias = scale * normal(outputs)
            if rank == 0:
                deltas[layer, site] = Delta(bias=bias)
            else:
                a, b, mean = normal(inputs, rank) / rank**0.5, scale * normal(rank, outputs), normal(inputs)
                deltas[layer, site] = Delta(a, b, bias, mean)
    return Patch(deltas, config or random_config())


def version_patches() -> dict[str, tuple[Patch, str]]:
    """Return a patch for each version of the file, with the dtype to save it in.

    The values are fractions that do not depend on the processor, so the files are the same everywhere.
    """

    def fixed(*shape: int) -> Any:
        size = int(np.prod(shape))
        return ((np.arange(size) * 37 % 201 - 100) / 64).astype(np.float32).reshape(shape)

    delta = Delta(fixed(6, 2), fixed(2, 4), fixed(4), fixed(6))
    names = [(layer, part) for layer in range(2) for part in KV_PARTS]
    prefix, ragged = (
        KVPrefix({(layer, part): fixed(3, 2, 4)[: 3 - step * layer] for layer, part in names}, (1, 5), 9)
        for step in (0, 1)
    )
    config, stopping = random_config(), random_config(stop=("\n", "Q:"))
    return {
        "1": (Patch({(0, "mlp_out"): delta, (1, "gate"): Delta(bias=fixed(4))}, config), "f16"),
        "2": (Patch({(0, "mlp_out"): delta}, config, prefix), "f32"),
        "3": (Patch({(0, "mlp_out"): delta}, stopping, ragged), "i8"),
        "4": (Patch({(0, "mlp_out"): delta}, config, prefix), "i4"),
    }


def apply_patch(patch: Patch, x: Any) -> Any:
    """Return the float64 array [..., out] that the patch adds for x [..., in] at every slot, by (layer, site)."""
    added = {}
    for slot, delta in patch.deltas.items():
        total = 0.0
        if delta.a is not None:
            total = x.astype(np.float64) @ delta.a @ delta.b
        added[slot] = total if delta.bias is None else total + delta.bias.astype(np.float64)
    return added


def patch_for(folder: ModelFolder, seed: int = 0, rank: int = 4, scale: float = 1.0) -> Patch:
    """Return a patch with every part in every slot of an exported model.

    Args:
        folder: the exported model.
        seed: equal seeds give equal patches.
        rank: the rank of every delta; a delta of rank 0 has only a bias.
        scale: the standard deviation of a @ b and of the bias.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    deltas = {}
    for key, slot in folder.slots.items():
        bias = scale * normal(slot.outputs)
        if rank == 0:
            deltas[key] = Delta(bias=bias)
        else:
            a, b = normal(slot.inputs, rank) / rank**0.5, scale * normal(rank, slot.outputs)
            deltas[key] = Delta(a, b, bias, normal(slot.inputs))
    config = random_config(
        name=f"random-{seed}",
        base_model=folder.base_model,
        base_digest=folder.base_digest,
        architecture=folder.architecture,
        precision=fitted_precision(folder.precision),
        fidelity=None,
        probe=None,
    )
    return Patch(deltas, config)
