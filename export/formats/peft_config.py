"""The config of a LoRA adapter, adapter_config.json: which modules PEFT applies it to, and at which rank and scaling.

PEFT decides this by the config alone. It passes over tensors of other modules without a word, and a selected module
whose tensors are missing gets no effect. Every setting belongs to one of three groups: it is used here, it is known not
to change what is added, or it is refused. An adapter that would be read wrongly must not be read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tp_runtime.errors import PatchFormatError, PatchVersionError, shown
from tp_runtime.storage import read_json_object

from .bounded_regex import match_all

_USED = {
    *("bias", "init_lora_weights", "r", "lora_alpha", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path"),
}
# Only training or bookkeeping used these.
_HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout"),
    *("fan_in_fan_out", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "runtime_config"),
}
# With these initialisations a module without tensors adds nothing. Others (pissa, olora, corda, loftq) change the
# base's weights when the adapter is loaded.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal")
_ALL_LINEAR = "all-linear"
_MANY_TARGETS = 20  # from so many on, PEFT shortens the names in target_modules before it compares them
_LARGEST = float(np.finfo(np.float32).max)
_NUMBERED = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")  # the first number in a module's name is its layer


@dataclass(frozen=True)
class Scaling:
    """How an adapter is applied to one module: the rank of its pair, and the factor on what pair and bias add."""

    rank: int
    factor: float


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter that decide what it adds.

    Attributes:
        rank: `r`, the rank of modules that `rank_pattern` does not name.
        alpha: `lora_alpha`, the alpha of modules that `alpha_pattern` does not name.
        rslora: `use_rslora`, whether the factor is alpha / sqrt(r) instead of alpha / r.
        ranks: `rank_pattern`, ranks by regular expression.
        alphas: `alpha_pattern`, alphas by regular expression.
        targets: `target_modules`: names or ends of names, or a regular expression, or "all-linear".
        exclude: `exclude_modules`: names or ends of names, or a regular expression.
        layers: `layers_to_transform`; None if all layers are meant.
        layer_names: `layers_pattern`, regular expressions for what stands in front of a layer's number; empty if
            everything may.
        bias: `lora_bias`, whether the pairs have a bias.
        random: whether a selected module without tensors would get random ones.
        base: the name of the base model; "" if there is none.
    """

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: str | tuple[str, ...]
    exclude: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layer_names: tuple[str, ...]
    bias: bool
    random: bool
    base: str

    @classmethod
    def read(cls, file: Path) -> AdapterConfig:
        """Read adapter_config.json.

        Raises:
            PatchFormatError: the file cannot be read, or a setting has a wrong type or value, or contradicts another.
            PatchVersionError: a setting is one that a patch cannot represent, or that this reader does not know.
        """
        config = read_json_object(file, PatchFormatError, "copy the adapter again", lenient=True)
        _check_representable(config)
        targets = _names("target_modules", config.get("target_modules"))
        layers = config.get("layers_to_transform")
        layers = None if layers is None or layers == [] else _layers(layers)
        layer_names = _names("layers_pattern", config.get("layers_pattern") or [])
        if isinstance(targets, str) and (layers is not None or layer_names):
            raise _bad("layers_to_transform", "a value", "null, because target_modules is a regular expression")
        if layer_names and layers is None:
            raise _bad("layers_pattern", layer_names, "null, because layers_to_transform is null")
        if layers is not None and len(targets) >= _MANY_TARGETS:
            raise _bad("target_modules", f"{len(targets)} names", f"below {_MANY_TARGETS} with layers_to_transform")
        return cls(
            rank=_rank("r", config.get("r", 8)),
            alpha=_alpha("lora_alpha", config.get("lora_alpha", 8)),
            rslora=_flag("use_rslora", config.get("use_rslora", False)),
            ranks={key: _rank(f"rank_pattern[{key!a}]", n) for key, n in _object("rank_pattern", config).items()},
            alphas={key: _alpha(f"alpha_pattern[{key!a}]", n) for key, n in _object("alpha_pattern", config).items()},
            targets=targets,
            exclude=_names("exclude_modules", config.get("exclude_modules") or []),
            layers=layers,
            layer_names=(layer_names,) if isinstance(layer_names, str) else layer_names,
            bias=_flag("lora_bias", config.get("lora_bias", False)),
            random=not config.get("init_lora_weights", True),
            base=_text("base_model_name_or_path", config.get("base_model_name_or_path") or ""),
        )

    def selected(self, modules: Collection[str]) -> dict[str, Scaling]:
        """Return the modules that PEFT applies the adapter to, each with its scaling.

        Args:
            modules: the names of linear layers of the base, such as `model.layers.0.mlp.down_proj`.

        Raises:
            PatchFormatError: a setting is not a regular expression, or one that takes too long.
        """
        names = list(modules)
        every = isinstance(self.targets, str) and self.targets.lower() == _ALL_LINEAR
        patterns = {f"rank_pattern[{key!a}]": rf"(.*\.)?({key})$" for key in self.ranks}
        patterns |= {f"alpha_pattern[{key!a}]": rf"(.*\.)?({key})$" for key in self.alphas}
        patterns |= {f"layers_pattern[{key!a}]": rf"(?:^|.*?\.){key}\.(?P<idx>\d+)\." for key in self.layer_names}
        wholes = {} if every else {"target_modules": self.targets}
        wholes["exclude_modules"] = self.exclude
        regexes = {field: pattern for field, pattern in wholes.items() if isinstance(pattern, str)}
        found = match_all(patterns | regexes, names, regexes)

        def listed(field: str, setting: str | tuple[str, ...], place: int) -> bool:
            if isinstance(setting, str):
                return found[field][place] is not None
            return names[place] in setting or names[place].endswith(tuple(f".{end}" for end in setting))

        def in_layers(place: int) -> bool:
            # PEFT does not look at the layer of a module that is named in full.
            if self.layers is None or names[place] in self.targets:
                return True
            numbers = [found[f"layers_pattern[{key!a}]"][place] for key in self.layer_names]
            if not self.layer_names and (match := _NUMBERED.match(names[place])):
                numbers = [match["idx"]]
            return next((int(number) in self.layers for number in numbers if number is not None), False)

        selected = {}
        for place, module in enumerate(names):
            targeted = every or (listed("target_modules", self.targets, place) and in_layers(place))
            if targeted and not listed("exclude_modules", self.exclude, place):
                ranks = (rank for key, rank in self.ranks.items() if found[f"rank_pattern[{key!a}]"][place] is not None)
                alphas = (n for key, n in self.alphas.items() if found[f"alpha_pattern[{key!a}]"][place] is not None)
                rank, alpha = next(ranks, self.rank), next(alphas, self.alpha)
                selected[module] = Scaling(rank, alpha / (rank**0.5 if self.rslora else rank))
        return selected


# -- the settings --------------------------------------------------------------------------------------------


def _check_representable(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise _unrepresentable("peft_type", config.get("peft_type"), "LORA")
    if config.get("bias", "none") != "none":
        raise _unrepresentable("bias", config["bias"], "none")
    init = config.get("init_lora_weights", True)
    plain = init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _PLAIN_INITS)
    if not plain:
        raise _unrepresentable("init_lora_weights", init, "one that leaves the base's weights as they are")
    for key, value in config.items():
        # A setting that is off has no effect, even if only a newer PEFT knows it.
        if value and key not in _USED | _HARMLESS:
            raise _unrepresentable(key, value, "the setting to be off")


def _unrepresentable(key: str, got: object, wanted: str) -> PatchVersionError:
    return PatchVersionError(
        "a patch cannot represent this setting of the adapter",
        field=f"adapter_config.{key}",
        got=shown(got),
        wanted=wanted,
        fix="merge the adapter into its base and export that as a model, or train it without this setting",
    )


def _bad(key: str, got: object, wanted: str) -> PatchFormatError:
    return PatchFormatError(
        "the adapter's config has a value that is not valid",
        field=f"adapter_config.{key}",
        got=shown(got),
        wanted=wanted,
        fix="copy the adapter again, or correct the value",
    )


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _bad(key, value, "true or false")
    return value


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _bad(key, value, "text")
    return value


def _rank(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise _bad(key, value, f"a whole number from 1 to {2**31 - 1}")
    return value


def _alpha(key: str, value: Any) -> float:
    # The comparison is false for NaN. A factor beyond float32 would make every value infinite.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise _bad(key, value, f"a finite number of magnitude up to {_LARGEST:.3g}")
    return float(value)


def _object(key: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise _bad(key, value, "an object of numbers")
    return value


def _names(key: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _bad(key, value, "a list of texts, or a regular expression")
    return tuple(value)


def _layers(value: Any) -> tuple[int, ...]:
    numbers = value if isinstance(value, list) else [value]
    if not all(type(number) is int for number in numbers):  # a bool is an int in Python, but not in JSON
        raise _bad("layers_to_transform", value, "a layer's number, or a list of them")
    return tuple(numbers)
