"""This module reads an ordinary LoRA folder, as PEFT trains and saves it, as deltas of a base's linear layers.

PEFT adds scaling * (B (A x) + bias_B) with scaling = alpha / r, or alpha / sqrt(r) under rsLoRA. Therefore a = A^T,
b = scaling * B^T, bias = scaling * bias_B. Which layers it is added to, peft_config.py finds out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tp_runtime.errors import PatchShapeError, PatchTargetError, shortened
from tp_runtime.patch import Delta, SlotKey, read_tensors

from ..decoder import SiteLinear
from .peft_config import AdapterConfig, Scaling

Array = NDArray[np.float32]

_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias)")
_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """An adapter of another tool.

    Attributes:
        deltas: the deltas, by (layer, site).
        base: the name of the base model that the adapter states; "" if it states none.
        notes: what the user should know: tensors that have no effect, and layers without tensors.
    """

    deltas: Mapping[SlotKey, Delta]
    base: str
    notes: tuple[str, ...]


def is_lora_folder(path: Path) -> bool:
    """Return whether `path` is a folder with an adapter's config."""
    return (path / _CONFIG).is_file()


def read_peft(folder: Path, layers: Mapping[SlotKey, SiteLinear]) -> Adapter:
    """Read an adapter folder, and apply it to the layers that PEFT applies it to.

    Args:
        folder: the folder with adapter_config.json and adapter_model.safetensors.
        layers: the linear layer of each slot (decoder.site_linears).

    Raises:
        PatchFormatError: a file is damaged or unsafe, or a setting has a wrong value.
        PatchVersionError: the adapter has a setting that a patch cannot represent, or that this reader does not know.
        PatchTargetError: a tensor does not belong to the LoRA of a linear layer with a slot, half of a pair is missing,
            the adapter holds no tensor that its config selects, or PEFT would draw missing tensors at random.
        PatchShapeError: a tensor does not fit its layer, or its rank is not the config's.
    """
    config = AdapterConfig.read(folder / _CONFIG)
    slots = {linear.module: (slot, linear) for slot, linear in layers.items() if slot[1] != "mlp_out"}
    found = _tensors(folder, slots)
    selected = config.selected(slots)
    deltas, missing, idle = {}, [], []
    for module, scaling in selected.items():
        parts = found.pop(module, {})
        if not parts:
            missing.append(module)
            continue
        if not config.bias and parts.pop("B.bias", None) is not None:
            idle.append(f"{module}.lora_B.bias")
        if config.bias and "B.bias" not in parts:
            missing.append(f"{module}.lora_B.bias")
        slot, linear = slots[module]
        deltas[slot] = _delta(module, parts, linear, scaling)
    if not deltas:
        raise PatchTargetError(
            "the adapter's config selects none of the adapter's tensors, so PEFT would apply nothing",
            field=str(folder),
            got=shortened([*found]),
            wanted="tensors of modules that target_modules selects and exclude_modules does not",
        )
    if missing and config.random:
        raise PatchTargetError(
            "tensors are missing, and with its init_lora_weights PEFT would draw them at random",
            field=str(folder),
            got=shortened(missing),
            wanted="the tensors of every selected module",
            fix="copy the adapter again, or exclude these modules in its config",
        )
    notes = []
    if idle := [*found, *idle]:
        notes.append(f"the adapter's config leaves out, as PEFT does, the tensors of {shortened(idle)}")
    if missing:
        notes.append(f"the adapter has no tensors for {shortened(missing)}, so it adds nothing there, as with PEFT")
    return Adapter(deltas, config.base, tuple(notes))


def _tensors(folder: Path, slots: Mapping[str, tuple[SlotKey, SiteLinear]]) -> dict[str, dict[str, Array]]:
    """Return the adapter's tensors by module and part."""
    file = folder / "adapter_model.safetensors"
    if not file.exists() and (folder / "adapter_model.bin").exists():
        file = folder / "adapter_model.bin"  # read_tensors refuses this name, as it refuses every pickle
    found: dict[str, dict[str, Array]] = {}
    for name, values in read_tensors(file).items():
        match = _NAME.fullmatch(name)
        if match is None or match["module"] not in slots:
            raise PatchTargetError(
                "a tensor of the adapter has no slot",
                field=name,
                got="another module",
                wanted="lora_A and lora_B of " + ", ".join(sorted({module.rpartition(".")[2] for module in slots})),
                fix="train or save the adapter with only these target_modules",
            )
        found.setdefault(match["module"], {})[match["part"]] = values
    if not found:
        raise PatchTargetError("the adapter holds no tensor", field=str(file), got=0, wanted="lora_A and lora_B")
    return found


def _delta(module: str, parts: Mapping[str, Array], linear: SiteLinear, scaling: Scaling) -> Delta:
    if not {"A.weight", "B.weight"} <= set(parts):
        raise PatchTargetError(
            "the adapter holds only half of a pair",
            field=module,
            got=" and ".join(sorted(parts)),
            wanted="lora_A and lora_B",
        )
    rank = scaling.rank
    shapes = {"A.weight": (rank, linear.inputs), "B.weight": (linear.outputs, rank), "B.bias": (linear.outputs,)}
    for part, values in parts.items():
        if values.shape != shapes[part]:
            raise PatchShapeError(
                "a tensor of the adapter does not fit the base",
                field=f"{module}.lora_{part}",
                got=list(values.shape),
                wanted=list(shapes[part]),
                fix="pass the base model that the adapter was trained on",
            )
    bias = parts.get("B.bias")
    with np.errstate(over="ignore"):  # the patch reports infinity, with the slot's name
        return Delta(
            parts["A.weight"].T,
            np.float32(scaling.factor) * parts["B.weight"].T,
            None if bias is None else np.float32(scaling.factor) * bias,
        )
