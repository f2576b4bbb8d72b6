"""An ordinary LoRA folder, as PEFT trains and saves it, read as deltas beside a base's linear layers.

PEFT adds scaling * (B (A x) + bias_B) with scaling = alpha / r, or alpha / sqrt(r) under rsLoRA; so a = A^T,
b = scaling * B^T, bias = scaling * bias_B. Every setting of the adapter's config is either known to leave that formula
alone, used in it, or refused: an adapter that would be read wrongly must not be read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tp_runtime.errors import PatchFormatError, PatchShapeError, PatchTargetError, PatchVersionError
from tp_runtime.patch import Delta, read_tensors

from ..decoder import SiteLinear

Array = NDArray[np.float32]
Deltas = dict[tuple[int, str], Delta]

# What the formula uses.
_USED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
# What training or bookkeeping used: the tensors and the formula are complete without it.
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
# Initialisations that leave the base's weights alone; the others (pissa, olora, corda, loftq) change them on loading.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias)")


def is_lora_folder(path: Path) -> bool:
    """Whether `path` is a folder with an adapter's config."""
    return (path / "adapter_config.json").is_file()


def read_peft(folder: Path, layers: Mapping[tuple[int, str], SiteLinear]) -> tuple[Deltas, str]:
    """Read an adapter folder.

    Args:
        folder: adapter_config.json and adapter_model.safetensors.
        layers: the linear layer beside each slot (module_names.beside).

    Returns:
        The deltas, and the name of the base model that the adapter gives ("" if none).

    Raises:
        PatchFormatError: a damaged or unsafe file.
        PatchVersionError: a setting that a patch cannot represent, or that this reader does not know.
        PatchTargetError: a tensor of something else than a LoRA of a linear layer with a slot; half of a pair.
        PatchShapeError: a tensor that does not fit its layer, or a rank that is not the config's.
    """
    config = _read_config(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    if not file.exists() and (folder / "adapter_model.bin").exists():
        file = folder / "adapter_model.bin"  # refused by name below, as every pickle is
    tensors = read_tensors(file)
    slots = {where.module: (slot, where) for slot, where in layers.items() if slot[1] != "mlp_out"}
    found: dict[str, dict[str, Array]] = {}
    for name, values in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match["module"] not in slots or not _targeted(match["module"], config):
            raise PatchTargetError(
                "a tensor of the adapter has no slot",
                field=name,
                got="a module outside target_modules" if match and match["module"] in slots else "another module",
                wanted="lora_A and lora_B of " + ", ".join(sorted({module.rpartition(".")[2] for module in slots})),
                fix="train or save the adapter with these target_modules alone",
            )
        found.setdefault(match["module"], {})[match["part"]] = values
    if not found:
        raise PatchTargetError("the adapter holds no tensor", field=str(file), got=0, wanted="lora_A and lora_B")
    deltas = {}
    for module, parts in found.items():
        slot, where = slots[module]
        deltas[slot] = _delta(module, parts, where, config)
    return deltas, str(config.get("base_model_name_or_path") or "")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PatchFormatError(f"cannot be read: {error}", field=str(file), fix="copy the adapter again") from error
    if not isinstance(config, dict):
        raise PatchFormatError("not a JSON object", field=str(file), got=type(config).__name__)
    if config.get("peft_type") != "LORA":
        raise _unrepresentable("peft_type", config.get("peft_type"), "LORA")
    if config.get("bias", "none") != "none":
        raise _unrepresentable("bias", config["bias"], "none")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise _unrepresentable("init_lora_weights", init, "one that leaves the base's weights as they are")
    for key, value in config.items():
        # A key that is off means nothing, whatever a newer peft calls it.
        if value and key not in _USED | _HARMLESS | {"bias", "init_lora_weights"}:
            raise _unrepresentable(key, value, "nothing")
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise PatchFormatError(
            "not a rank and an alpha", field=str(file), got=f"r {rank!r}, lora_alpha {alpha!r}", wanted="numbers"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        numbers = isinstance(patterns, dict) and all(isinstance(value, int | float) for value in patterns.values())
        if not numbers:
            raise PatchFormatError("not patterns to numbers", field=key, got=patterns, wanted="an object")
    return config


def _unrepresentable(key: str, got: object, wanted: str) -> PatchVersionError:
    return PatchVersionError(
        "a patch cannot represent this setting of the adapter",
        field=f"adapter_config.{key}",
        got=repr(got)[:200],
        wanted=wanted,
        fix="merge the adapter into its base and export that as a model, or train it without",
    )


def _targeted(module: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT would put an adapter on `module`: tensors of others it leaves aside without a word."""
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the module's name at a dot, as a regular expression."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _delta(module: str, parts: Mapping[str, Array], where: SiteLinear, config: Mapping[str, Any]) -> Delta:
    if not {"A.weight", "B.weight"} <= set(parts):
        raise PatchTargetError(
            "half of a pair", field=module, got=" and ".join(sorted(parts)), wanted="lora_A and lora_B"
        )
    rank = _pattern(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    shapes = {"A.weight": (rank, where.inputs), "B.weight": (where.outputs, rank), "B.bias": (where.outputs,)}
    for part, values in parts.items():
        if values.shape != shapes[part]:
            raise PatchShapeError(
                "a tensor of the adapter does not fit",
                field=f"{module}.lora_{part}",
                got=list(values.shape),
                wanted=list(shapes[part]),
                fix="give the base model that the adapter was trained on",
            )
    scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    bias = parts.get("B.bias")
    return Delta(
        parts["A.weight"].T,
        np.float32(scaling) * parts["B.weight"].T,
        None if bias is None else np.float32(scaling) * bias,
    )
