"""This module reads an ordinary LoRA folder, as PEFT trains and saves it, as deltas of a base's linear layers.

PEFT adds scaling * (B (A x) + bias_B) with scaling = alpha / r, or alpha / sqrt(r) under rsLoRA. Therefore a = A^T,
b = scaling * B^T, bias = scaling * bias_B. Every setting of the adapter's config belongs to one of three groups: the
setting is known not to change that formula, the formula uses it, or the reader refuses it. An adapter that would be
read wrongly must not be read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tp_runtime.errors import PatchFormatError, PatchShapeError, PatchTargetError, PatchVersionError
from tp_runtime.patch import Delta, SlotKey, read_tensors
from tp_runtime.storage import read_json_object

from ..decoder import SiteLinear

Array = NDArray[np.float32]
Deltas = dict[SlotKey, Delta]

# Settings that the formula uses.
_USED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
# Settings that only training or bookkeeping used. The tensors and the formula are complete without them.
_HARMLESS = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "lora_bias",  # the bias is among the tensors
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "runtime_config",
}
# Initialisations that do not change the base's weights; the others (pissa, olora, corda, loftq) change them on loading.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias)")


def is_lora_folder(path: Path) -> bool:
    """Return whether `path` is a folder with an adapter's config."""
    return (path / "adapter_config.json").is_file()


def read_peft(folder: Path, layers: Mapping[SlotKey, SiteLinear]) -> tuple[Deltas, str]:
    """Read an adapter folder.

    Args:
        folder: the folder with adapter_config.json and adapter_model.safetensors.
        layers: the linear layer of each slot (decoder.site_linears).

    Returns:
        The deltas, and the name of the base model from the adapter's config ("" if it has none).

    Raises:
        PatchFormatError: a file is damaged or unsafe.
        PatchVersionError: the adapter has a setting that a patch cannot represent, or that this reader does not know.
        PatchTargetError: a tensor does not belong to the LoRA of a linear layer with a slot, or half of a pair is
            missing, or the adapter holds no tensor.
        PatchShapeError: a tensor does not fit its layer, or its rank is not the config's.
    """
    config = _read_config(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    if not file.exists() and (folder / "adapter_model.bin").exists():
        file = folder / "adapter_model.bin"  # read_tensors refuses this name, as it refuses every pickle
    tensors = read_tensors(file)
    slots = {linear.module: (slot, linear) for slot, linear in layers.items() if slot[1] != "mlp_out"}
    found: dict[str, dict[str, Array]] = {}
    for name, values in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match["module"] not in slots or not _targeted(match["module"], config):
            raise PatchTargetError(
                "a tensor of the adapter has no slot",
                field=name,
                got="a module outside target_modules" if match and match["module"] in slots else "another module",
                wanted="lora_A and lora_B of " + ", ".join(sorted({module.rpartition(".")[2] for module in slots})),
                fix="train or save the adapter with only these target_modules",
            )
        found.setdefault(match["module"], {})[match["part"]] = values
    if not found:
        raise PatchTargetError("the adapter holds no tensor", field=str(file), got=0, wanted="lora_A and lora_B")
    deltas = {}
    for module, parts in found.items():
        slot, linear = slots[module]
        deltas[slot] = _delta(module, parts, linear, config)
    return deltas, str(config.get("base_model_name_or_path") or "")


def _read_config(file: Path) -> dict[str, Any]:
    config = read_json_object(file, PatchFormatError, "copy the adapter again", lenient=True)
    if config.get("peft_type") != "LORA":
        raise _unrepresentable("peft_type", config.get("peft_type"), "LORA")
    if config.get("bias", "none") != "none":
        raise _unrepresentable("bias", config["bias"], "none")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise _unrepresentable("init_lora_weights", init, "one that leaves the base's weights as they are")
    for key, value in config.items():
        # A setting that is off has no effect, even if only a newer PEFT knows it.
        if value and key not in _USED | _HARMLESS | {"bias", "init_lora_weights"}:
            raise _unrepresentable(key, value, "the setting to be off")
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise PatchFormatError(
            "the rank or the alpha of the adapter is not valid",
            field=str(file),
            got=f"r {rank!r}, lora_alpha {alpha!r}",
            wanted="a whole number r >= 1 and a number lora_alpha",
        )
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        numbers = isinstance(patterns, dict) and all(isinstance(value, int | float) for value in patterns.values())
        if not numbers:
            raise PatchFormatError(
                "the setting does not map patterns to numbers", field=key, got=patterns, wanted="an object of numbers"
            )
    return config


def _unrepresentable(key: str, got: object, wanted: str) -> PatchVersionError:
    return PatchVersionError(
        "a patch cannot represent this setting of the adapter",
        field=f"adapter_config.{key}",
        got=repr(got)[:200],
        wanted=wanted,
        fix="merge the adapter into its base and export that as a model, or train it without this setting",
    )


def _targeted(module: str, config: Mapping[str, Any]) -> bool:
    """Return whether PEFT would put an adapter on `module`. PEFT ignores tensors of other modules without a warning."""
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first key that matches the end of the module's name, or `default` if none does.

    This is PEFT's rule. A key is a regular expression, and its match must start at a dot or be the whole name.
    """
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _delta(module: str, parts: Mapping[str, Array], linear: SiteLinear, config: Mapping[str, Any]) -> Delta:
    if not {"A.weight", "B.weight"} <= set(parts):
        raise PatchTargetError(
            "the adapter holds only half of a pair",
            field=module,
            got=" and ".join(sorted(parts)),
            wanted="lora_A and lora_B",
        )
    rank = _pattern(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
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
    scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    bias = parts.get("B.bias")
    return Delta(
        parts["A.weight"].T,
        np.float32(scaling) * parts["B.weight"].T,
        None if bias is None else np.float32(scaling) * bias,
    )
