"""A patch as a PEFT LoRA folder: adapter_config.json and adapter_model.safetensors.

A slot adds (x a) b + bias to the output of a linear layer; PEFT adds scaling * (B (A x) + bias_B). Therefore A = a^T,
B = b^T, bias_B = bias (`lora_bias`) and scaling = lora_alpha / r = 1.

Every pair is padded with zeros to the patch's largest rank, so that one r = lora_alpha holds for all layers. PEFT
itself accepts rank_pattern and alpha_pattern, but vLLM and llama.cpp's converter read only r and lora_alpha, and would
scale layers of another rank wrongly without a warning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tp_runtime.errors import PatchShapeError, PatchTargetError
from tp_runtime.patch import Delta, Patch, SlotKey, slot_name
from tp_runtime.storage import Kind, atomic_folder, system_errors

from ..decoder import SiteLinear

Array = NDArray[np.float32]
_PREFIX = "base_model.model."
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Pair:
    """The LoRA of one linear layer, at scaling 1: y + B (A x) + bias.

    Attributes:
        a: the factor A [rank, in].
        b: the factor B [out, rank].
        bias: the bias [out], or None if the patch has none.
    """

    a: Array
    b: Array
    bias: Array | None


def pairs(patch: Patch, layers: Mapping[SlotKey, SiteLinear]) -> dict[str, Pair]:
    """Return the patch as LoRA pairs, all of the patch's largest rank (1 if the patch has only biases).

    Args:
        patch: the patch.
        layers: the linear layer of each slot (decoder.site_linears).

    Returns:
        A mapping from module name to pair.

    Raises:
        PatchTargetError: the base has no linear layer for a slot, or the patch has a KV prefix.
        PatchShapeError: a delta does not fit its linear layer.
    """
    patch.require_weights_only("LoRA")
    merged: dict[str, Delta] = {}
    for slot, delta in patch.deltas.items():
        linear = _linear_of(patch, slot, layers)
        _check_shape(patch, slot, delta, linear)
        # On Llama-like models `down` and `mlp_out` are the same place, so their sum is one pair.
        merged[linear.module] = merged[linear.module].joined(delta, slot) if linear.module in merged else delta
    rank = max(1, *(delta.rank for delta in merged.values()))
    sizes = {linear.module: linear for linear in layers.values()}
    return {module: _pair(delta, rank, sizes[module]) for module, delta in merged.items()}


def write_peft(
    patch: Patch, layers: Mapping[SlotKey, SiteLinear], out: Path, base: str, replaces: Kind | None = None
) -> None:
    """Write the folder, completely or not at all.

    Args:
        patch: the patch.
        layers: the linear layer of each slot.
        out: the path of the folder to make.
        base: the base model that the adapter's config names: a hub id or a folder.
        replaces: the kind of folder that may be replaced, such as LORA_FOLDER; None for none.

    Raises:
        PatchTargetError, PatchShapeError: `pairs` raises it.
        OutputError: `out` holds something that is not replaced.
        OSError: the operating system reports an error. Nothing is left behind.
    """
    found = pairs(patch, layers)
    rank = next(iter(found.values())).a.shape[0]
    biased = any(pair.bias is not None for pair in found.values())
    tensors: dict[str, Array] = {}
    for module, pair in found.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = pair.a
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = pair.b
        if biased:  # `lora_bias` holds for all layers, so those without a bias get zeros
            bias = np.zeros(pair.b.shape[0], np.float32) if pair.bias is None else pair.bias
            tensors[f"{_PREFIX}{module}.lora_B.bias"] = bias
    config = _config(base, rank, biased, sorted(found))
    with atomic_folder(out, replaces, [base]) as folder, system_errors():
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors writes through a private temporary file (0600). The file gets the mode of the config, which the
        # user's umask decided.
        (folder / WEIGHTS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode & 0o777)


def _config(base: str, rank: int, biased: bool, modules: list[str]) -> dict[str, Any]:
    return {
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
        "target_modules": modules,
    }


def is_written_here(config: Mapping[str, Any]) -> bool:
    """Return whether an adapter_config.json has exactly the settings that `write_peft` writes: peft writes more."""
    return config.keys() == _config("", 0, False, []).keys()


def _linear_of(patch: Patch, slot: SlotKey, layers: Mapping[SlotKey, SiteLinear]) -> SiteLinear:
    linear = layers.get(slot)
    if linear is not None:
        return linear
    layer, site = slot
    if site == "mlp_out" and (layer, "down") in layers:
        raise PatchTargetError(
            f"the patch {patch.name!r} acts after the block's post-norm, where a LoRA cannot act",
            field=f"layers.{layer}.mlp_out",
            got="mlp_out",
            wanted="sites of linear layers: down, gate, up, q, k, v, o",
            fix="fit it in LoRA form: tp-export patch SRC OUT.safetensors --method lora ...",
        )
    raise PatchTargetError(
        f"the base has no linear layer for this part of the patch {patch.name!r}",
        field=f"layers.{layer}.{site}",
        got=f"layer {layer}, site {site}",
        wanted=f"layers 0..{max(i for i, _ in layers)}, sites {', '.join(sorted({s for _, s in layers}))}",
        fix="use the base model that the patch was fitted on",
    )


def _check_shape(patch: Patch, slot: SlotKey, delta: Delta, linear: SiteLinear) -> None:
    for part, values, axis, size in (
        ("a", delta.a, 0, linear.inputs),
        ("b", delta.b, 1, linear.outputs),
        ("bias", delta.bias, 0, linear.outputs),
    ):
        if values is not None and values.shape[axis] != size:
            raise PatchShapeError(
                f"the patch {patch.name!r} does not fit the base",
                field=slot_name(*slot, part),
                got=values.shape[axis],
                wanted=f"{size}, as in {linear.module}",
                fix="use the base model that the patch was fitted on",
            )


def _pair(delta: Delta, rank: int, linear: SiteLinear) -> Pair:
    a = np.zeros((rank, linear.inputs), np.float32)
    b = np.zeros((linear.outputs, rank), np.float32)
    if delta.a is not None and delta.b is not None:
        a[: delta.rank], b[:, : delta.rank] = delta.a.T, delta.b.T
    return Pair(a, b, delta.bias)
