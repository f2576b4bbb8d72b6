"""A patch as a PEFT LoRA folder: adapter_config.json and adapter_model.safetensors.

A slot adds (x a) b + bias beside a linear layer; PEFT adds scaling * (B (A x) + bias_B). So A = a^T, B = b^T,
bias_B = bias (`lora_bias`) and scaling = lora_alpha / r = 1.

Every pair is padded with zeros to the patch's largest rank, so that one r = lora_alpha holds for all layers: PEFT
itself would take rank_pattern and alpha_pattern, but vLLM and llama.cpp's converter read r and lora_alpha alone, and
would scale layers of another rank wrongly without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tp_runtime.errors import PatchShapeError, PatchTargetError
from tp_runtime.patch import Delta, Patch, slot_name
from tp_runtime.storage import atomic_folder

from ..decoder import SiteLinear

Array = NDArray[np.float32]
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Pair:
    """The LoRA of one linear layer, at scaling 1: y + B (A x) + bias.

    Attributes:
        a: A [rank, in].
        b: B [out, rank].
        bias: [out], or None where the patch has none.
    """

    a: Array
    b: Array
    bias: Array | None


def pairs(patch: Patch, layers: Mapping[tuple[int, str], SiteLinear]) -> dict[str, Pair]:
    """The patch as LoRA pairs, module name to pair, all of the patch's largest rank (1 for a patch of biases alone).

    Args:
        patch: the patch.
        layers: the linear layer beside each slot (module_names.beside).

    Raises:
        PatchTargetError: a slot lies beside no linear layer, or the patch carries a KV prefix.
        PatchShapeError: the base has fewer layers, or others.
    """
    patch.require_weights_only("LoRA")
    merged: dict[str, Delta] = {}
    for slot, delta in patch.deltas.items():
        where = _beside(patch, slot, layers)
        _check_shape(patch, slot, delta, where)
        # On Llama-like models `down` and `mlp_out` are one place: their sum is one pair.
        merged[where.module] = merged[where.module].joined(delta, slot) if where.module in merged else delta
    rank = max(1, *(delta.rank for delta in merged.values()))
    sizes = {where.module: where for where in layers.values()}
    return {module: _pair(delta, rank, sizes[module]) for module, delta in merged.items()}


def write_peft(
    patch: Patch, layers: Mapping[tuple[int, str], SiteLinear], out: Path, base: str, overwrite: bool
) -> None:
    """Write the folder, whole or not at all.

    Args:
        patch: the patch.
        layers: the linear layer beside each slot.
        out: the folder to make.
        base: what the adapter says its base model is: a hub id or a folder.
        overwrite: replace a folder that is there.

    Raises:
        PatchTargetError, PatchShapeError: see `pairs`.
        ModelFormatError: `out` is taken.
        OSError: the operating system's error; nothing is left behind.
    """
    found = pairs(patch, layers)
    rank = next(iter(found.values())).a.shape[0]
    biased = any(pair.bias is not None for pair in found.values())
    tensors: dict[str, Array] = {}
    for module, pair in found.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = pair.a
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = pair.b
        if biased:  # one switch for all layers: those without a bias get zeros
            bias = np.zeros(pair.b.shape[0], np.float32) if pair.bias is None else pair.bias
            tensors[f"{_PREFIX}{module}.lora_B.bias"] = bias
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": biased,
        "target_modules": sorted(found),
    }
    with atomic_folder(out, overwrite=overwrite) as folder:
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        # safetensors writes through a private temporary file (0600); the user's umask decided for its neighbour.
        (folder / "adapter_model.safetensors").chmod((folder / "adapter_config.json").stat().st_mode & 0o777)


def _beside(patch: Patch, slot: tuple[int, str], layers: Mapping[tuple[int, str], SiteLinear]) -> SiteLinear:
    where = layers.get(slot)
    if where is not None:
        return where
    layer, site = slot
    if site == "mlp_out" and (layer, "down") in layers:
        raise PatchTargetError(
            f"the patch {patch.name!r} acts after the block's post-norm, where no LoRA can",
            field=f"layers.{layer}.mlp_out",
            got="mlp_out",
            wanted="sites beside linear layers: down, gate, up, q, k, v, o",
            fix="fit it in LoRA form: tp-export patch SRC OUT.safetensors --method lora ...",
        )
    raise PatchTargetError(
        f"the base has no linear layer for this part of the patch {patch.name!r}",
        field=f"layers.{layer}.{site}",
        got=f"layer {layer}, site {site}",
        wanted=f"layers 0..{max(i for i, _ in layers)}, sites {', '.join(sorted({s for _, s in layers}))}",
        fix="use the base model that the patch was fitted on",
    )


def _check_shape(patch: Patch, slot: tuple[int, str], delta: Delta, where: SiteLinear) -> None:
    for part, values, axis, size in (
        ("a", delta.a, 0, where.inputs),
        ("b", delta.b, 1, where.outputs),
        ("bias", delta.bias, 0, where.outputs),
    ):
        if values is not None and values.shape[axis] != size:
            raise PatchShapeError(
                f"the patch {patch.name!r} does not fit the base",
                field=slot_name(*slot, part),
                got=values.shape[axis],
                wanted=f"{size}, as in {where.module}",
                fix="use the base model that the patch was fitted on",
            )


def _pair(delta: Delta, rank: int, where: SiteLinear) -> Pair:
    a = np.zeros((rank, where.inputs), np.float32)
    b = np.zeros((where.outputs, rank), np.float32)
    if delta.a is not None and delta.b is not None:
        a[: delta.rank], b[:, : delta.rank] = delta.a.T, delta.b.T
    return Pair(a, b, delta.bias)
